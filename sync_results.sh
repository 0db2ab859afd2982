#!/usr/bin/env bash
# Copy a results directory here, over ssh or on this machine; for cron and launchd, or by hand.
# Works with macOS's bash 3.2, openrsync and perl. What one wants to see comes first, what restarts
# need last; nothing is deleted here but old training states, by the rule that the remote follows.
set -u
export LC_ALL=C PATH="$PATH:/usr/bin:/bin:/usr/sbin:/sbin"

usage() {
    cat <<'END'
usage: sync_results.sh [-k KEY] [[USER@HOST:]DIR [LOCAL_DIR]]
  -k KEY   the ssh key to use (cron has no agent)
Without DIR, REMOTE from the environment is copied, with the key SSH_KEY if it is set, to ~/results:
  export REMOTE=ubuntu@ec2:project/results SSH_KEY=~/.ssh/ec2.pem; ./sync_results.sh
Copies progress, report, models, figures and data, then the newest training state; each file gets
its name once it is whole, and what was cut off goes on next time. Of training states as many stay
here as there; one goes only after a newer one was verified here. Nothing else is deleted.
Prints one dated line. SYNC_SECONDS (default 1800) bounds a run.
Exit codes: 0 done, or another sync is at it; 1 this machine's fault (disk full, not writable, a bad
copy); 2 settings (key, host key, no such directory, no rsync there, a login banner); 75 try again
later (unreachable, cut off, time over).
END
}

say() { printf '%s %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*"; }
fail() {
    local code=$1
    shift
    say "sync_results.sh: $*" >&2
    exit "$code"
}

# ---- shared with the other script, word for word (a test compares them) -----------------------

# Prints $1 in single quotes, which every shell reads; %q would write $'...', which dash does not.
quote() {
    local rest=$1 out=''
    while :; do
        case $rest in *\'*) ;; *) break ;; esac
        out="$out${rest%%\'*}'\\''"
        rest=${rest#*\'}
    done
    printf "'%s'" "$out$rest"
}

# Prints $1 as a person would type it: quoted only where it must be.
typed() { case $1 in '' | *[!A-Za-z0-9@%+=:,./_-]*) quote "$1" ;; *) printf '%s' "$1" ;; esac; }

# Prints file $1 for a terminal: no control characters, no carriage returns, as ssh ends its lines.
plain() { tr -d '\r' <"$1" | tr -c '\n -~' '?'; }

# watched SECONDS COMMAND ...: runs it in a process group of its own, of which nothing is left at
# the end; exit code 124 when the time was over. SIGTERM comes first and goes to the command alone:
# openrsync keeps what it has of a file on SIGTERM, but not on SIGALRM or SIGKILL, and the processes
# of GNU rsync lose it when a signal meets them in their cleaning up.
watched() {
    exec perl -e '
        my ($left, $asked, $late) = (shift, 0, 0);
        my $child = fork;
        exit 126 unless defined $child;
        unless ($child) { setpgrp(0, 0); exec { $ARGV[0] } @ARGV; exit 127 }
        setpgrp($child, $child);
        sub stop {
            kill TERM => $asked++ ? -$child : $child;
            kill KILL => -$child if $asked > 2;
            alarm 3;
        }
        $SIG{$_} = sub { stop() unless $asked } for qw(TERM INT HUP);
        $SIG{ALRM} = sub { $late = 1 unless $asked; stop() };
        alarm $left;
        waitpid $child, 0;
        my $status = $?;
        alarm 0;
        for (1 .. 30) {   # its children may still be putting away what they have
            kill $_ > 20 ? "TERM" : 0, -$child or last;
            select undef, undef, undef, 0.1;
        }
        kill KILL => -$child;
        exit 124 if $late;
        exit($status & 127 ? 128 + ($status & 127) : $status >> 8);
    ' "$@"
}

# Says what to type for target $1, if it has what other tools take and these scripts do not.
target_trouble() {
    local rest=${1#*:} port='22022' name='ec2:DIR'
    case $1 in
        ssh://* | sftp://* | scp://* | rsync://* | \[*\]:*) ;;
        *::*) case ${1%%::*} in */* | *:*) return 1 ;; esac ;;
        *:*:*)
            case ${1%%/*} in *:*) ;; *) return 1 ;; esac
            case ${rest%%:*} in '' | *[!0-9]*) return 1 ;; esac
            port=${rest%%:*} name=ec2:${rest#*:} ;;
        *) return 1 ;;
    esac
    printf '%s' "$1: give USER@HOST:DIR. Ports, users, jump hosts and addresses have their place" \
        " in ~/.ssh/config: lines 'Host ec2', 'HostName ADDRESS', 'Port $port', 'User ubuntu';" \
        " then type $name"
}

# What ssh gives as the reason: its last line in file $1, without warnings and lines of rsync's own.
reason() {
    plain "$1" | grep -Ev '^Warning: Permanently added|^\*\* |^rsync|^@@@|^[[:space:]]*$' |
        tail -n 1 | cut -c 1-200
}

# Leaves in file $1, for want of ssh's own words, what the host printed instead of answering ($2).
host_words() {
    if [ -z "$(reason "$1")" ]; then plain "$2" | grep -v '^look-' | head -n 20 >>"$1"; fi
}

# Says what to do about trouble of ssh that waiting does not mend: $1 ssh's words, $2 host, $3 key.
ssh_trouble() {
    if grep -q 'HOST IDENTIFICATION HAS CHANGED\|Host key verification failed' "$1"; then
        host_key_trouble "$1" "$2"
    elif grep -q 'Permission denied ([a-z]\|Too many authentication failures' "$1"; then
        key_trouble "$1" "$2" "$3"
    elif grep -q 'Bad configuration option\|command-line: line\|invalid characters' "$1" ||
        grep -q 'Please login as the user' "$1"; then   # what cloud machines say to root
        reason "$1"
    else
        return 1
    fi
}

# The entry's name and file are in ssh's words: for an alias or a port they are not the host's.
host_key_trouble() {
    local entry file
    entry=$(plain "$1" | sed -n 's/^Host key for \(.*\) has changed and .*/\1/p' | head -n 1)
    file=$(plain "$1" | sed -n 's/^Offending .* in \(.*\):[0-9]*$/\1/p' | head -n 1)
    if [ -z "$entry" ]; then printf '%s' "$2: $(reason "$1")"; return; fi
    if [ "$file" = "${HOME:-}/.ssh/known_hosts" ]; then file=''; fi
    printf '%s' "$2 shows another host key than before. If you know why (a new machine behind" \
        " the same name), type: ssh-keygen -R $(typed "$entry")${file:+ -f $(typed "$file")}" \
        "    Otherwise someone may be in between"
}

key_trouble() {
    local key=$3 why
    why=$(plain "$1" | grep '^Load key\|too open' | head -n 1)
    why=${why:-$(reason "$1")}
    if [ -z "$key" ]; then   # one of ~/.ssh/config or the usual ones: ssh's words may name it
        key=$(plain "$1" | sed -n "s/^Permissions [0-7]* for '\(.*\)' are too open.*/\1/p
            s/^Load key \"\(.*\)\": .*/\1/p" | head -n 1)
    fi
    if [ -z "$key" ]; then
        printf '%s' "$2 does not accept your keys ($why); give the right one with -k KEY," \
            " or type: ssh-copy-id $(typed "$2")"
    elif head -n 1 "$key" 2>/dev/null | grep -q '^ssh-\|^ecdsa-\|^sk-'; then
        printf '%s' "$key is the public half of a key; give the other: -k $(typed "${key%.pub}")"
    elif ! head -n 1 "$key" 2>/dev/null | grep -q 'PRIVATE KEY'; then
        printf '%s' "$key is not a private key ($why); give one with -k KEY"
    elif grep -q 'too open' "$1"; then
        printf '%s' "ssh uses no key that others may read ($why); type: chmod 600 $(typed "$key")"
    elif grep -q 'Load key.*\(libcrypto\|invalid format\)' "$1"; then
        printf '%s' "$key is damaged ($why): a line is missing or has another end than it had;" \
            " copy the file again, as a file"
    elif ssh-keygen -y -P '' -f "$key" </dev/null 2>&1 | grep -q 'incorrect passphrase'; then
        printf '%s' "$key is locked with a passphrase, and no agent holds it open ($why);" \
            " type: ssh-add $(typed "$key")"
    else
        printf '%s' "$2 does not accept the key $key ($why); give the right one with -k KEY," \
            " or type: ssh-copy-id -i $(typed "$key") $(typed "$2")"
    fi
}

# ---- end of what is shared --------------------------------------------------------------------

# ---- the command line -------------------------------------------------------------------------

key=${SSH_KEY:-}
while getopts ':k:h' flag; do
    case $flag in
        k) key=$OPTARG ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || set -- ${REMOTE:+"$REMOTE"}
if [ $# -eq 0 ] || [ $# -gt 2 ]; then usage >&2; exit 2; fi
if [ $# -eq 1 ]; then
    [ -n "${HOME:-}" ] || fail 2 "without HOME there is no ~/results; name a local directory"
    set -- "$1" "$HOME/results"
fi
from=$1 to=$2 host=''
if trouble=$(target_trouble "$from"); then fail 2 "$trouble"; fi
case $to in '') fail 2 "the local directory has no name; see -h" ;; /*) ;; *) to=./$to ;; esac
while [ "${to%/}" != "$to" ] && [ "$to" != / ]; do to=${to%/}; done
case ${from%%/*} in *:*) host=${from%%:*} from=${from#*:} ;; esac
case $host in -*) fail 2 "$1 is not a directory; see -h" ;; esac
if [ -n "$key" ] && [ ! -r "$key" ]; then
    if [ -e "$key" ]; then fail 2 "may not read the key $key; type: chmod 600 $(typed "$key")"; fi
    fail 2 "no key $key; give the path of a private key with -k"
fi
shown=${host:+$host:}$from
if [ -n "$host" ]; then   # relative to the home there, as ssh itself would have it
    case $from in '' | \~) from=. ;; \~/*) from=${from#??} ;; esac
elif [ -z "$from" ]; then
    fail 2 "'' is not a directory; see -h"
elif [ ! -d "$from" ]; then
    fail 2 "no such directory: $shown"
fi
case $from in /*) ;; *) from=./$from ;; esac   # so that no name is taken for an option
seconds=${SYNC_SECONDS:-1800}
case $seconds in '' | *[!0-9]* | 0 | ???????*)
    fail 2 "SYNC_SECONDS must be a number of seconds, not $seconds" ;;
esac
if ! command -v rsync >/dev/null 2>&1; then fail 1 "no rsync on this machine; install it"; fi
if ! trouble=$(mkdir -p -- "$to" 2>&1); then fail 1 "cannot make $to: ${trouble##*: }"; fi

# ---- only one at a time -----------------------------------------------------------------------
# A kernel lock, held by this very process (exec keeps it) and by what it starts: a dead process
# holds nothing, whatever its number is now, and a transfer that outlives us still holds it.
if [ -z "${SYNC_RESULTS_LOCKED:-}" ]; then
    export SYNC_RESULTS_LOCKED=yes
    exec perl -e '
        use Fcntl qw(:DEFAULT :flock); use Errno qw(EWOULDBLOCK); use POSIX qw(strftime);
        my $path = shift;
        sub refuse {
            my $why = $!;
            print STDERR strftime("%Y-%m-%d %H:%M:%S", localtime),
                " sync_results.sh: cannot $_[0] $path: $why\n";
            exit 1;
        }
        $^F = 255;
        sysopen(LOCK, $path, O_RDWR | O_CREAT) or refuse("write");
        unless (flock(LOCK, LOCK_EX | LOCK_NB)) {
            refuse("lock") unless $! == EWOULDBLOCK;
            print "another sync to this directory is at work\n" if -t STDOUT;   # not to a log
            exit 0;
        }
        exec { $ARGV[0] } @ARGV or exit 1;
    ' "$to/.sync_results.lock" "$BASH" "$0" ${key:+-k "$key"} -- "$1" "$2"
fi
unset SYNC_RESULTS_LOCKED

tmp=$(mktemp -d /tmp/sync_results.XXXXXX) || fail 1 "cannot make a directory in /tmp"
worker=''
stop_working() {
    if [ -n "$worker" ]; then kill -TERM "$worker" 2>/dev/null; wait "$worker" 2>/dev/null; fi
    worker=''
}
trap 'stop_working; rm -rf "$tmp"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# ---- reaching the other side ------------------------------------------------------------------

# rsync takes the name of a program to reach the host: one of ours, since options with spaces
# would be torn apart.
export SYNC_KEY=$key
cat >"$tmp/ssh" <<'END'
exec ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 \
    -o StrictHostKeyChecking=accept-new -o ClearAllForwardings=yes -o RequestTTY=no \
    -o RemoteCommand=none \
    ${SYNC_KEY:+-o IdentitiesOnly=yes -i "$SYNC_KEY"} "$@"
END
deadline=$(($(date +%s) + seconds))

too_late() { fail 75 "not finished after $seconds s; the next run goes on from here"; }

# work COMMAND ...: runs it until the deadline; it reads $tmp/script, if anything, and leaves its
# output in $tmp/out, its errors in $tmp/trouble.
work() {
    local left code
    left=$((deadline - $(date +%s)))
    [ "$left" -gt 0 ] || too_late
    watched "$left" "$@" <"$tmp/script" >"$tmp/out" 2>"$tmp/trouble" &
    worker=$!
    wait "$worker"
    code=$?
    worker=''
    [ "$code" -ne 124 ] || too_late
    return "$code"
}

# What runs on the far side to see what is there; it gets `dir` and `mark` in front.
far_side() {
    printf 'dir=%s mark=%s\n' "$(quote "$from")" "$mark"
    cat <<'END'
LC_ALL=C; export LC_ALL
printf '%s hello\n' "$mark"
if ! cd "$dir" 2>/dev/null; then
    if [ -d "$dir" ]; then printf '%s closed\n' "$mark"; else printf '%s missing\n' "$mark"; fi
elif ! command -v rsync >/dev/null 2>&1; then
    printf '%s norsync\n' "$mark"
else
    find . \( -name '.?*' -o -type d -name '*.old[0-9]*' \) -prune -o -type f -print 2>/dev/null |
        while IFS= read -r file; do
            printf '%s file %s\n' "$mark" "$file"
            case $file in */run.json)
                id=$(sed -n 's/.*"run": *"\([0-9A-Za-z]*\)".*/\1/p' "$file" | head -n 1)
                printf '%s run %s %s\n' "$mark" "${id:-none}" "$file" ;;
            esac
        done
fi
printf '%s end\n' "$mark"
END
}

# Leaves the names of all files there in $tmp/files ("./train/history.json") and the runs in
# $tmp/runs ("6f1c2a ./train/run.json"), or ends with what is in the way.
look() {
    local mark="look-$$-$RANDOM$RANDOM" why
    far_side >"$tmp/script" || fail 1 "cannot write in $tmp: is that disk full?"
    if [ -n "$host" ]; then work sh "$tmp/ssh" -- "$host" 'sh -s'; else work sh -s; fi
    if ! tail -n 1 "$tmp/out" | grep -qx "$mark end"; then
        host_words "$tmp/trouble" "$tmp/out"
        if why=$(ssh_trouble "$tmp/trouble" "$host" "$key"); then fail 2 "$why"; fi
        why=$(reason "$tmp/trouble")
        fail 75 "$host cannot be reached or was cut off (${why:-no answer});" \
            "the next run goes on from here"
    fi
    if [ "$(head -n 1 "$tmp/out")" != "$mark hello" ]; then login_text; fi
    sed -n "s/^$mark //p" "$tmp/out" >"$tmp/seen"
    if grep -qx missing "$tmp/seen"; then fail 2 "no such directory: $shown"; fi
    if grep -qx closed "$tmp/seen"; then fail 2 "may not enter $shown"; fi
    if grep -qx norsync "$tmp/seen"; then no_rsync; fi
    sed -n 's/^file \.\//.\//p' "$tmp/seen" | grep -Ev '/\.\./|\.(tmp|corrupt)$' >"$tmp/files"
    sed -n 's/^run //p' "$tmp/seen" | grep ' \./' | grep -v '/\.\./' >"$tmp/runs"
    looked=$(date +%s)
}

login_text() {
    fail 2 "$host prints text at login, which rsync cannot read past; silence it for" \
        "non-interactive shells (.bashrc)"
}
no_rsync() { fail 2 "no rsync on $host; install it there (apt-get install rsync)"; }

# ---- copying ----------------------------------------------------------------------------------

only=(--include='*/' --exclude='*' --prune-empty-dirs)   # behind the names to include

source_of() {
    if [ -z "$host" ]; then printf '%s/' "$from"; return; fi
    printf '%s:%s/' "$host" "$(quote "$from")"
}

# copy RSYNC_OPTION ...: one pass over all but what is never a result. A failure ends the program.
copy() {
    local code
    partials >"$tmp/partials"
    work env RSYNC_OLD_ARGS=1 RSYNC_PROTECT_ARGS=0 rsync -rt --partial-dir=.rsync-partial \
        --out-format=%n -e "sh $tmp/ssh" --exclude='.*' --exclude='*.tmp' --exclude='*.corrupt' \
        --exclude='*.old[0-9]*/' "$@" "$(source_of)" "$to/"
    code=$?
    cat "$tmp/out" >>"$tmp/copied"
    open_resumed
    case $code in
        0 | 24) ;;   # 24: a file went away while we looked, as old checkpoints do
        *) explain "$code" ;;
    esac
}

partials() { find "$to" -type f -path '*/.rsync-partial/*' 2>/dev/null; }

# openrsync leaves files that it resumed with mode 0600: give them what the umask gives new files.
open_resumed() {
    local part file
    while IFS= read -r part; do
        file=${part%/.rsync-partial/*}/${part##*/}
        if [ ! -e "$part" ] && [ -n "$(find "$file" -perm 600 2>/dev/null)" ]; then
            chmod '=rw' "$file"
        fi
    done <"$tmp/partials"
}

saw() { grep -qi "$1" "$tmp/trouble"; }

# What a failed pass means; returns only if the files that failed were gone before their turn.
explain() {
    local last why
    last=$(reason "$tmp/trouble")
    [ -n "$last" ] || last=$(plain "$tmp/trouble" |
        grep -v '^rsync error\|poll: bad fd\|^$' | tail -n 1 | cut -c 1-200)
    if [ -n "$host" ] && why=$(ssh_trouble "$tmp/trouble" "$host" "$key"); then
        fail 2 "$why"
    elif saw 'No space left\|Disk quota\|disk full'; then
        fail 1 "no room in $to; make some, and the next run goes on from here"
    elif saw 'Read-only file system'; then
        fail 1 "$to is read-only"
    elif saw 'mkstemp.*failed\|recv_generator.*failed\|failed to set times\|make way for' ||
        saw '\[\(receiver\|generator\)\].*denied'; then
        fail 1 "cannot write to $to: $last"
    elif [ "$1" -eq 127 ] || saw 'rsync.*not found\|command not found\|not recognized'; then
        no_rsync
    elif saw 'is your shell clean\|protocol version mismatch' ||
        saw 'unexpected tag\|invalid.*handshake'; then
        login_text
    elif saw 'invalid option\|unknown option\|unrecognized option'; then
        fail 2 "$last"
    elif saw 'Permission denied'; then
        # 23: of some files, said at the end, since all else is brought first.
        [ "$1" -eq 23 ] || fail 2 "may not read all of $shown: $last"
        unreadable=$last
        return
    elif [ "$1" -eq 23 ] && saw 'No such file or directory\|vanished'; then
        look   # openrsync's way to say 24; if the directory itself is gone, this says so
        return
    fi
    fail 75 "${host:-rsync} cannot be reached or was cut off (${last:-rsync exit $1});" \
        "the next run goes on from here"
}

# ---- what earlier runs left -------------------------------------------------------------------

export checkpoint='checkpoint_[0-9]+([.][A-Za-z0-9_-]+)+'   # awk takes it from the environment

there() { grep -Fqx -- "$1" "$tmp/files"; }
size() { if [ -f "$1" ]; then wc -c <"$1"; else echo 0; fi; }

# Has any process file $1 open? We hold the lock, but it may be another program's transfer.
in_use() {
    if command -v lsof >/dev/null 2>&1; then
        [ -n "$(lsof -t -- "$1" 2>/dev/null)" ]
    elif [ -d /proc/self/fd ]; then
        perl -e '
            my @file = stat shift or exit 1;
            for (glob "/proc/[0-9]*/fd/*") {
                my @open = stat or next;
                exit 0 if $open[0] == $file[0] && $open[1] == $file[1];
            }
            exit 1;' "$1"
    else
        [ -z "$(find "$1" -mtime +0)" ]   # nobody can tell: what a day left untouched is dead
    fi
}

# An rsync that was killed leaves .NAME.XXXXXX (openrsync ten X) beside NAME. The next transfer of
# NAME goes on from it once it stands in the partial directory; what no transfer needs is removed.
use_debris() {
    local file dir name end part
    find "$to" -type f -name '.?*.??????*' >"$tmp/hidden" 2>/dev/null
    while IFS= read -r file; do
        dir=${file%/*}/ name=${file##*/.}
        end=${name##*.} name=${name%.*}
        case ${#end} in 6 | 10) ;; *) continue ;; esac
        # Random ones nearly always have a capital and something else; names given by hand do not.
        case $end in *[!A-Za-z0-9]*) continue ;; *[A-Z]*) ;; *) continue ;; esac
        case $end in *[a-z0-9]*) ;; *) continue ;; esac
        part=$dir.rsync-partial/$name
        if there "./${dir#"$to/"}$name"; then
            if in_use "$file"; then continue; fi
            if [ "$(size "$file")" -gt "$(size "$part")" ] && mkdir -p "${part%/*}"; then
                mv -f "$file" "$part"
            else
                rm -f "$file"
            fi
        elif [ -e "$dir$name" ] || [[ $name =~ ^$checkpoint$ ]]; then
            in_use "$file" || rm -f "$file"
        fi
    done <"$tmp/hidden"
    # Halves of files that are not there any more, such as old training states.
    if [ -s "$tmp/files" ]; then
        partials | while IFS= read -r part; do
            file=${part%/.rsync-partial/*}/${part##*/}
            there "./${file#"$to/"}" || in_use "$part" || rm -f "$part"
        done
    fi
}

# After a sync that brought everything, no half is needed.
remove_halves() {
    partials | while IFS= read -r part; do in_use "$part" || rm -f "$part"; done
    find "$to" -type d -name .rsync-partial -exec rmdir {} + 2>/dev/null
}

# ---- a run that began anew there --------------------------------------------------------------
# train --fresh puts the old run aside there and begins another under its name. Here too: copies of
# the old one would be overwritten, and its higher-numbered states taken for newer ones.

# At the first sync to a directory: what is there already was not brought by us.
leave_what_is_not_ours() {
    local file top
    while IFS= read -r file; do
        file=${file#./} top=$to/${file%%/*}
        if [ -e "$to/$file" ] || { [ "$file" != "${file%%/*}" ] && [ -f "$top" ]; }; then
            fail 2 "$top was there before the first sync to $to, and would be replaced; give" \
                "another local directory, or, if it is a copy of $shown, type:" \
                "echo $(typed "$shown") > $(typed "$to/.sync_results.lock")"
        fi
    done <"$tmp/files"
}

run_id() { sed -n 's/.*"run": *"\([0-9A-Za-z]*\)".*/\1/p' "$1" 2>/dev/null | head -n 1; }

set_old_runs_aside() {
    local id path dir aside number old source
    source=$(head -n 1 "$to/.sync_results.lock")
    [ -n "$source" ] || leave_what_is_not_ours
    while read -r id path; do
        dir=$to/${path#./}
        old=$(run_id "$dir")
        dir=${dir%/run.json}
        if [ -z "$old" ] || [ "$id" = none ] || [ "$old" = "$id" ]; then continue; fi
        if [ "$source" != "$shown" ]; then
            fail 2 "$to has copies of other runs, from $source (if that is another name of the" \
                "same machine, use it); give another local directory, or type:" \
                "mv $(typed "$to") $(typed "${to%/}.before")"
        fi
        aside=$(cd "$dir" && pwd -P) number=1
        while [ -e "$aside.old$number" ]; do number=$((number + 1)); done
        aside=$aside.old$number
        if [ "$dir" = "$to" ]; then empty_into "$aside"; else mv "$dir" "$aside"; fi ||
            fail 1 "$shown has begun anew, and the old copies in $dir cannot be moved to $aside"
        notes="$notes; a new run began there, the old one's copies are in $aside"
    done <"$tmp/runs"
    printf '%s\n' "$shown" >"$to/.sync_results.lock"   # who the copies are of, for the next time
}

# The directory itself stays, since it has our lock; run.json goes last, for a move that is cut off.
empty_into() {
    local entry
    mkdir "$1" || return 1
    for entry in "$to"/*; do
        if [ "$entry" != "$to/run.json" ]; then mv "$entry" "$1/" || return 1; fi
    done
    mv "$to/run.json" "$1/"
}

# ---- training states --------------------------------------------------------------------------
# A checkpoint is a state, or a piece of a data set: its line in checkpoints.jsonl tells. States
# replace each other; pieces are data.

# Prints "name start stop bytes sha256" for each whole line of file $1.
records() {
    awk '
        function value(key,    at, rest) {
            at = index($0, "\"" key "\":")
            if (!at) return "?"
            rest = substr($0, at + length(key) + 3)
            sub(/^ *"?/, "", rest)
            sub(/[",}].*$/, "", rest)
            return rest
        }
        /^[{].*[}]$/ {
            name = value("name"); start = value("start"); stop = value("stop")
            bytes = value("bytes"); sum = value("sha256")
            if (name ~ ("^" ENVIRON["checkpoint"] "$") && start ~ /^[0-9]+$/ &&
                stop ~ /^[0-9]+$/ && bytes ~ /^[0-9]+$/ && sum ~ /^[0-9a-f]+$/ && length(sum) == 64)
                print name, start, stop, bytes, sum
        }' "$1" 2>/dev/null
}

# Leaves in $tmp/dirs the directories there ("./", "./train/") whose checkpoints are states.
find_state_dirs() {
    grep -E "/$checkpoint\$" "$tmp/files" | sed 's|[^/]*$||' | sort -u |
        while IFS= read -r dir; do
            if records "$to/${dir#./}checkpoints.jsonl" |
                awk '$2 == $3 { state = 1 } $2 != $3 { piece = 1 } END { exit !(state && !piece) }'
            then printf '%s\n' "$dir"; fi
        done >"$tmp/dirs"
}

# Leaves in $tmp/models, figures and data which files of each kind are there: without any, a pass,
# which is a login, can be spared.
sort_files() {
    local kind
    for kind in models figures data; do : >"$tmp/$kind"; done
    TMPDIR=$tmp awk '
        FILENAME == ARGV[1] { states[$0] = 1; next }
        {
            name = $0; sub(/.*\//, "", name)
            dir = substr($0, 1, length($0) - length(name))
            if (name ~ ("^" ENVIRON["checkpoint"] "$")) kind = (dir in states) ? "" : "data"
            else if (name ~ /^(PROGRESS[.]txt|run[.]json|checkpoints[.]jsonl)$/) kind = ""
            else if (name ~ /^report[.]/) kind = ""
            else if (name ~ /[.]pt$/) kind = "models"
            else if (name ~ /[.](jsonl?|png|svg|gif|html|txt|csv)$/) kind = "figures"
            else kind = "data"
            if (kind != "") print >(ENVIRON["TMPDIR"] "/" kind)
        }' "$tmp/dirs" "$tmp/files"
}

# Names of states, from stdin: in the order of their numbers.
by_number() { sed 's/^checkpoint_\([0-9]*\)\..*/\1 &/' | sort -n | cut -d ' ' -f 2; }

states_there() {
    DIR=$1 awk '{ name = substr($0, length(ENVIRON["DIR"]) + 1) }
        index($0, ENVIRON["DIR"]) == 1 && name ~ ("^" ENVIRON["checkpoint"] "$") { print name }
        ' "$tmp/files" | by_number
}
states_here() {
    local file
    for file in "$to/${1#./}"checkpoint_*; do [ -f "$file" ] && printf '%s\n' "${file##*/}"; done |
        grep -E "^$checkpoint\$" | grep -Ev '\.(tmp|corrupt)$' | by_number
}

escaped() { printf '%s' "$1" | sed 's/[][*?\\]/\\&/g'; }
# rsync takes a backslash for itself in a pattern without wildcards.
pattern() { case $1 in *[*?[]*) escaped "$1" ;; *) printf '%s' "$1" ;; esac; }

sha256_of() {
    if command -v shasum >/dev/null 2>&1; then shasum -a 256 <"$1"
    elif command -v sha256sum >/dev/null 2>&1; then sha256sum <"$1"
    else openssl dgst -sha256 <"$1" | sed 's/.*= *//'; fi | cut -d ' ' -f 1
}

# Is the copy of state $2 in directory $1 the very bytes that were recorded?
verified() {
    local file="$to/${1#./}$2" line
    line=$(records "$to/${1#./}checkpoints.jsonl" | grep "^$2 " | tail -n 1)
    [ -n "$line" ] && [ "$(sha256_of "$file")" = "${line##* }" ]
}

# The run there forgets the records of states that it has let go of; some of these are still here,
# and their records vouch for them. Keep what was known before this sync of each state here.
save_records() {
    find "$to" -type d -name '*.old[0-9]*' -prune -o -type f -name checkpoints.jsonl -print |
        while IFS= read -r file; do
            mkdir -p "$tmp/known/${file#"$to/"}" && cp "$file" "$tmp/known/${file#"$to/"}/"
        done
}
restore_records() {
    local dir file name known
    while IFS= read -r dir; do
        file=$to/${dir#./}checkpoints.jsonl known=$tmp/known/${dir#./}checkpoints.jsonl
        [ -f "$known/checkpoints.jsonl" ] || continue
        states_here "$dir" | while IFS= read -r name; do
            records "$file" | grep -q "^$name " ||
                grep -F "\"$name\"" "$known/checkpoints.jsonl" | tail -n 1
        done >"$tmp/lost"
        [ ! -s "$tmp/lost" ] ||
            { cat "$tmp/lost" "$file" >"$file.tmp" && mv "$file.tmp" "$file"; }
    done <"$tmp/dirs"
}

# Brings the newest state of each training, with the records that vouch for it.
copy_states() {
    local dir newest wanted=()
    while IFS= read -r dir; do
        newest=$(states_there "$dir" | tail -n 1)
        [ -n "$newest" ] || continue
        dir=$(pattern "${dir#./}")
        wanted+=("--include=/$dir$newest" "--include=/${dir}checkpoints.jsonl")
    done <"$tmp/dirs"
    [ -z "${wanted[*]-}" ] || copy "$@" "${wanted[@]}" "${only[@]}"
    restore_records
}

# Lets go of the oldest states beyond as many as are kept there, once the newest one is verified.
let_go() {
    local dir newest keep old bad=''
    [ -n "$(sha256_of /dev/null 2>/dev/null)" ] ||
        fail 1 "none of shasum, sha256sum and openssl is here: states cannot be verified"
    while IFS= read -r dir; do
        newest=$(states_there "$dir" | tail -n 1)
        keep=$(states_there "$dir" | grep -c .)
        if [ -z "$newest" ] || [ ! -f "$to/${dir#./}$newest" ]; then continue; fi
        # (Those with higher numbers are not ours to judge: the run there went back to this one.)
        states_here "$dir" | awk -v newest="$newest" -v keep="$keep" '
            { name[NR] = $0 } $0 == newest { last = NR }
            END { for (i = 1; i <= last - keep; i++) print name[i] }' >"$tmp/old"
        if [ ! -s "$tmp/old" ] && ! grep -Fqx -- "${dir#./}$newest" "$tmp/copied"; then continue; fi
        if ! verified "$dir" "$newest"; then
            bad="$bad ${dir#./}$newest"
            continue
        fi
        [ ! -s "$tmp/old" ] || sync   # to the disk: a power cut must not take the newer one as well
        while IFS= read -r old; do
            rm -f "$to/${dir#./}$old" && gone=$((gone + 1))
        done <"$tmp/old"
    done <"$tmp/dirs"
    unverified=$bad
}

# ---- a sync -----------------------------------------------------------------------------------

began=$(date +%s) notes='' gone=0 unverified='' unreadable=''
: >"$tmp/copied"
look
set_old_runs_aside
use_debris
save_records

# Progress first: what follows is at least as new as what it says. -c: a file that is written anew
# may have kept its size within one second.
copy -c --include=PROGRESS.txt --include=run.json --include=checkpoints.jsonl \
    --include='report.*' "${only[@]}"
find_state_dirs
restore_records
sort_files
rest=(--exclude=PROGRESS.txt --exclude=run.json)   # one version of them holds for all that follows
while IFS= read -r dir; do
    dir=/$(escaped "${dir#./}")
    rest+=("--exclude=${dir}checkpoint_[0-9]*" "--exclude=${dir}checkpoints.jsonl")
done <"$tmp/dirs"
if [ -s "$tmp/models" ]; then
    copy -c --exclude='checkpoint_[0-9]*' --include='*.pt' "${only[@]}"
fi
if [ -s "$tmp/figures" ]; then
    copy -c --exclude='checkpoint_[0-9]*' "${rest[@]}" --include='*.json' --include='*.jsonl' \
        --include='*.png' --include='*.svg' --include='*.gif' --include='*.html' \
        --include='*.txt' --include='*.csv' "${only[@]}"
fi
if [ -s "$tmp/data" ]; then copy "${rest[@]}"; fi

if [ -s "$tmp/dirs" ]; then
    if [ $(($(date +%s) - looked)) -gt 20 ]; then   # by now there are newer ones
        look
        set_old_runs_aside
    fi
    copy_states
    let_go
    if [ -n "$unverified" ]; then   # a damaged copy: its bytes are compared with those there
        copy_states -I
        let_go
    fi
    [ -z "$unverified" ] || fail 1 "the copy in $to of$unverified is not what checkpoints.jsonl" \
        "records, also after it was brought again; the older states were kept. Is the file there" \
        "whole (python checkpointing.py verify), and the disk here?"
fi
[ -z "$unreadable" ] || fail 2 "may not read all of $shown: $unreadable; all else was brought"
remove_halves

[ "$gone" -eq 0 ] || notes="; $gone older training states let go$notes"
count=$(grep -Ev '/$|PROGRESS.txt$|checkpoints.jsonl$|^skipping ' "$tmp/copied" |
    sort -u | grep -c .)
say "$shown -> $to: $count new files in $(($(date +%s) - began)) s$notes"
