#!/usr/bin/env bash
# Copy a results directory here, over ssh or on this machine; for cron and launchd, or by hand.
# Works with macOS's bash 3.2 and openrsync. Nothing is deleted here but old training states.
set -u
export LC_ALL=C PATH="$PATH:/usr/bin:/bin:/usr/sbin:/sbin"

usage() {
    cat <<'END'
usage: sync_results.sh [-k SSH_KEY] [[USER@HOST:]DIR [LOCAL_DIR]]
Without DIR, REMOTE from the environment is copied, with the key SSH_KEY if it is set, to ~/results:
  export REMOTE=ubuntu@ec2:project/results SSH_KEY=~/.ssh/ec2.pem; ./sync_results.sh
A file gets its name once it is whole; what was cut off goes on next time. No more training states
stay here than there; one goes only after a newer one was verified here. Nothing else is deleted.
Prints one dated line. SYNC_SECONDS (default 1800) bounds a run.
Exit codes: 0 done, or another sync is at it; 1 this machine (disk full, not writable, a bad copy);
2 settings (key, host key, no such directory, a file that may not be read); 75 try again later.
END
}

say() { printf '%s %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*"; }
fail() { say "sync_results.sh: ${*:2}" >&2; exit "$1"; }

# ---- the same in both scripts -----------------------------------------------------------------

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

ssh_options=(-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10
    -o ServerAliveCountMax=3 -o StrictHostKeyChecking=accept-new -o ClearAllForwardings=yes
    -o RequestTTY=no -o RemoteCommand=none)

# Prints why host $2 did not answer: the last line of $1, all that ssh said. Returns 0 if waiting
# does not mend it. The two cases that cost people hours are told with what to type.
reason() {
    local last entry file
    last=$(grep -Ev '^look-|^[|]|^Warning: Permanently added|^rsync|^ *$' <<<"$1" | tail -n 1)
    case $1 in
        *'HOST IDENTIFICATION HAS CHANGED'*)
            entry=$(sed -n 's/^Host key for \(.*\) has changed and .*/\1/p' <<<"$1")
            file=$(sed -n 's/^Offending .* in \(.*\):[0-9]*$/\1/p' <<<"$1" | head -n 1)
            printf '%s' "$2 shows another host key than before. If you know why (a new machine" \
                " behind the same name), type: ssh-keygen -R $(quote "$entry")" \
                " -f $(quote "$file")    Otherwise someone may be in between" ;;
        *'are too open'*)
            file=$(sed -n "s/^Permissions [0-7]* for '\(.*\)' are too open.*/\1/p" <<<"$1")
            printf '%s' "ssh uses no key that others may read; type: chmod 600 $(quote "$file")" ;;
        *'Permission denied ('*) printf '%s' "$last" ;;
        *) printf '%.200s' "${last:-no answer}"; return 1 ;;
    esac
}

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
from=$1 to=${2-${HOME:-}/results} host='' shown=$1 limit=${SYNC_SECONDS:-1800}
case ${to%%/*} in *:*) fail 2 "$to is not of this machine; type: sync_results.sh FROM TO" ;; esac
case $to in '') fail 2 "the local directory has no name" ;; /*) ;; *) to=./$to ;; esac
case ${from%%/*} in *:*) host=${from%%:*} from=${from#*:} ;; esac
if [ -n "$host" ]; then   # relative to the home there, as ssh itself would have it
    case $from in '' | \~) from=. ;; \~/*) from=${from#??} ;; esac
elif [ ! -d "$from" ]; then
    fail 2 "no such directory: $from"
fi
case $from in /*) ;; *) from=./$from ;; esac   # so that no name is taken for an option
case $limit in '' | *[!0-9]* | ???????*) fail 2 "SYNC_SECONDS takes seconds, not $limit" ;; esac
if [ -n "$key" ]; then
    [ -r "$key" ] || fail 2 "cannot read the key $key; give the path of a private key with -k"
    ssh_options+=(-o IdentitiesOnly=yes -i "$key")
fi
if ! command -v rsync >/dev/null; then fail 1 "no rsync on this machine; install it"; fi

# Only one at a time: a kernel lock on descriptor 9, which this shell and all that it starts share.
# A dead process holds nothing; a transfer that outlives us still does.
lock=$to/.sync_results.lock
if ! { mkdir -p -- "$to" && : >>"$lock"; } 2>/dev/null; then fail 1 "cannot write in $to"; fi
exec 9>>"$lock"
perl -e 'use Fcntl ":flock"; open F, ">&=9" or exit 1;
    flock F, LOCK_EX | LOCK_NB or exit($!{EWOULDBLOCK} ? 9 : 1)'
case $? in
    0) ;;
    9) if [ -t 1 ]; then echo "another sync to $to is at work"; fi; exit 0 ;;   # not in a log
    *) fail 1 "cannot lock $lock" ;;
esac

# ---- reaching the other side ------------------------------------------------------------------

tmp=$(mktemp -d /tmp/sync_results.XXXXXX) || fail 1 "cannot make a directory in /tmp"
worker=''
trap '[ -z "$worker" ] || stop; rm -rf "$tmp"' EXIT
trap 'exit 130' INT; trap 'exit 143' TERM HUP

# Ends what is at work. SIGTERM goes to the command alone: rsync then keeps what it has of a file,
# but not if a signal meets its other processes while they put it away.
stop() {
    local patience=60
    worker=${!-}     # a signal may have come before it was assigned
    kill -TERM "$worker"
    while kill -0 -- "-$worker" && [ $((patience -= 1)) -gt 0 ]; do sleep 0.1; done
    kill -KILL -- "-$worker"
    wait "$worker"
} 2>/dev/null

# work COMMAND ...: runs it in a process group of its own, until the time is over (no rsync's own
# limit bounds a frozen transfer); its output is in $tmp/out then, its errors in $tmp/trouble.
work() {
    local code
    worker=begun
    perl -e 'setpgrp 0, 0; exec { $ARGV[0] } @ARGV; exit 127' "$@" \
        <"$tmp/script" >"$tmp/out" 2>"$tmp/trouble" &
    worker=$!
    while kill -0 "$worker" && [ "$SECONDS" -lt "$limit" ]; do sleep 0.1; done 2>/dev/null
    [ "$SECONDS" -lt "$limit" ] || fail 75 "not done after $limit s; the next run goes on from here"
    wait "$worker"
    code=$?
    worker=''
    return "$code"
}

# rsync takes a program to reach the host, in one word.
{ printf 'exec ssh'; for option in "${ssh_options[@]}"; do printf ' %s' "$(quote "$option")"; done
    printf ' "$@"\n'; } >"$tmp/ssh"
mark="look-$$-$RANDOM$RANDOM"

# What runs on the far side: prints the names of all files, the id of each run, and the directories
# that may not be read (lost+found, say).
far_side() {
    printf 'dir=%s mark=%s\n' "$(quote "$from")" "$mark"
    cat <<'END'
LC_ALL=C; export LC_ALL
printf '%s hello\n' "$mark"
command -v rsync >/dev/null || printf '%s norsync\n' "$mark"
cd "$dir" 2>/dev/null || { printf '%s missing\n%s end\n' "$mark" "$mark"; exit; }
find . \( -name '.?*' -o -type d -name '*.old[0-9]*' \) -prune -o -type d -print -o -type f -print \
    2>/dev/null | while IFS= read -r file; do
    if [ ! -d "$file" ]; then
        printf '%s file %s\n' "$mark" "$file"
    elif [ ! -r "$file" ] || [ ! -x "$file" ]; then
        printf '%s closed %s\n' "$mark" "$file"
    fi
    case $file in */run.json)
        id=$(sed -n 's/.*"run": *"\([0-9A-Za-z]*\)".*/\1/p' "$file")
        printf '%s run %s %s\n' "$mark" "$id" "$file" ;;
    esac
done
printf '%s end\n' "$mark"
END
}

# Leaves in $tmp/files ("./train/history.json"), $tmp/runs ("6f1c2a ./train/run.json") and
# $tmp/closed ("./lost+found") what is there, or ends with what is in the way.
look() {
    local why command=(sh -s)
    [ -z "$host" ] || command=(sh "$tmp/ssh" -- "$host" sh -s)
    far_side >"$tmp/script" || fail 1 "cannot write in $tmp: is that disk full?"
    work "${command[@]}"
    if ! tail -n 1 "$tmp/out" | grep -qx "$mark end"; then
        why=$(cat "$tmp/out" "$tmp/trouble" | tr -d '\r' | tr -c '\n -~' '?')
        if why=$(reason "$why" "$host"); then fail 2 "$why"; fi
        fail 75 "$host cannot be reached or was cut off ($why); the next run goes on from here"
    fi
    [ "$(head -n 1 "$tmp/out")" = "$mark hello" ] || fail 2 "$host prints text at login, which" \
        "rsync cannot read past; silence it for non-interactive shells (.bashrc)"
    ! grep -qx "$mark norsync" "$tmp/out" || fail 2 "no rsync on $host; install it there"
    ! grep -qx "$mark missing" "$tmp/out" || fail 2 "no such directory: $shown"
    sed -n "s/^$mark file //p" "$tmp/out" | grep -Ev '[.](tmp|corrupt)$' >"$tmp/files"
    sed -n "s/^$mark run //p" "$tmp/out" >"$tmp/runs"
    sed -n "s/^$mark closed //p" "$tmp/out" >"$tmp/closed"
}

escaped() { printf '%s' "$1" | sed 's/[][*?\\]/\\&/g'; }   # for a pattern with wildcards

# copy RSYNC_OPTION ...: one pass over all but what is never a result.
copy() {
    local code why source=$from/
    [ -z "$host" ] || source=$host:$(quote "$from/")
    work rsync -rt --partial-dir=.rsync-partial --out-format=%n -e "sh $tmp/ssh" \
        ${closed[@]+"${closed[@]}"} --exclude='.*' --exclude='*.tmp' --exclude='*.corrupt' \
        --exclude='*.old[0-9]*/' "$@" "$source" "$to/"
    code=$?
    cat "$tmp/out" >>"$tmp/copied"
    [ "$code" -ne 0 ] && [ "$code" -ne 24 ] || return 0   # 24: a file went away while we looked
    why='No space left|Disk quota|disk full|Read-only|mkstemp.*failed|recv_generator.*failed'
    if why=$(grep -Ei "$why|make way for" "$tmp/trouble"); then
        fail 1 "cannot write in $to: ${why##*$'\n'}; the next run goes on from here"
    elif [ "$code" -eq 23 ] && why=$(grep 'Permission denied' "$tmp/trouble"); then
        unreadable=${why##*$'\n'}   # of some files: the others come first
    elif [ "$code" -ne 23 ] || ! grep -q 'No such file\|vanished' "$tmp/trouble"; then
        why=$(reason "$(tr -d '\r' <"$tmp/trouble" | tr -c '\n -~' '?')" "$host")
        [ "$why" != 'no answer' ] || why=$(grep -v 'bad fd' "$tmp/trouble" | tail -n 1)
        fail 75 "${host:-rsync} was cut off (${why:-code $code}); the next run goes on from here"
    fi   # otherwise 23 is openrsync's 24
}

# train --fresh puts the old run aside there and begins another under its name. Here too: copies of
# the old one would be overwritten, and its higher-numbered states taken for newer ones.
set_old_runs_aside() {
    local file id old dir aside number entry source
    source=$(head -n 1 "$lock")   # who the copies are of; at the first sync, nobody
    while [ -z "$source" ] && IFS= read -r file; do
        if [ -e "$to/$file" ] || [ -f "$to/${file%/*}" ]; then
            fail 2 "$to${file#.} was here before the first sync, and would be replaced; give" \
                "another local directory, or, if it is a copy of $shown, type:" \
                "echo $(quote "$shown") > $(quote "$lock")"
        fi
    done <"$tmp/files"
    while read -r id file; do
        dir=$to/${file%/run.json} number=1
        old=$(sed -n 's/.*"run": *"\([0-9A-Za-z]*\)".*/\1/p' "$dir/run.json" 2>/dev/null)
        if [ -z "$old" ] || [ "$old" = "$id" ]; then continue; fi
        [ "$source" = "$shown" ] || fail 2 "$to has copies of other runs, from $source; give" \
            "another local directory, or type: mv $(quote "$to") $(quote "${to%/}.before")"
        aside=$(cd "$dir" && pwd -P)
        while [ -e "$aside.old$number" ]; do number=$((number + 1)); done
        aside=$aside.old$number
        mkdir "$aside"
        for entry in "$dir"/*; do   # run.json goes last, for a move that is cut off
            [ "$entry" = "$dir/run.json" ] || mv "$entry" "$aside/" || exit 1
        done
        mv "$dir/run.json" "$aside/" || exit 1
        notes="$notes; a new run began there, the old one's copies are in $aside"
    done <"$tmp/runs"
    printf '%s\n' "$shown" >"$lock"
}

# Prints for directory $1 ("./train"): the newest state there, its SHA-256, and the names of those
# here that are too many by now, if as many may stay as there. (A checkpoint is a piece of data, or
# a state, which a newer one replaces: its record starts where it stops.)
states() {
    local file
    {
        sed 's/^/record /' "$to/$1/checkpoints.jsonl"
        sed 's/^/there /' "$tmp/files"
        for file in "$to/$1"/checkpoint_*; do printf 'here %s\n' "${file##*/}"; done
    } 2>/dev/null | START="there $1/" awk '
        function value(key,    rest) {
            if (!match($0, "\"" key "\": *")) return ""
            rest = substr($0, RSTART + RLENGTH)
            sub(/^"/, "", rest); sub(/[",}].*/, "", rest)
            return rest
        }
        $1 == "record" && value("start") == value("stop") && value("sha256") ~ /^[0-9a-f]+$/ {
            number[value("name")] = value("stop") + 0; sum[value("name")] = value("sha256")
        }
        index($0, ENVIRON["START"]) == 1 {
            name = substr($0, length(ENVIRON["START"]) + 1)
            if (name in number) keep++
            if (name in number && number[name] >= number[newest]) newest = name
        }
        $1 == "here" && $2 in number { here[$2] }
        END {
            if (newest == "") exit
            printf "%s %s", newest, sum[newest]
            for (old in here) {
                newer = 0
                for (n in here) newer += number[n] > number[old] && number[n] <= number[newest]
                if (newer >= keep) printf " %s", old
            }
        }'
}

# Lets go of the states that are too many, once the newest one is verified.
let_go() {
    local dir newest sum old too_many
    while IFS= read -r dir; do
        read -r newest sum too_many <<<"$(states "$dir")"
        if [ -z "$too_many" ] || [ ! -f "$to/$dir/$newest" ]; then continue; fi
        if ! "${sha256[@]}" <"$to/$dir/$newest" | grep -q "^$sum "; then
            mv -f "$to/$dir/$newest" "$to/$dir/$newest.corrupt"
            fail 1 "the copy of ${dir#./}/$newest is not what checkpoints.jsonl records: set" \
                "aside; the older states were kept. The next run brings it again"
        fi
        sync   # to the disk: a power cut must not take the newer one as well
        for old in $too_many; do rm -f "$to/$dir/$old" && gone=$((gone + 1)); done
    done <"$tmp/dirs"
}

# ---- a sync -----------------------------------------------------------------------------------

export RSYNC_OLD_ARGS=1 RSYNC_PROTECT_ARGS=0   # the far shell reads our quotes, whatever the rsync
notes='' gone=0 unreadable='' closed=() sha256=(shasum -a 256)
command -v shasum >/dev/null || sha256=(sha256sum)
: >"$tmp/copied"
look
set_old_runs_aside
while IFS= read -r dir; do
    closed+=("--exclude=$(escaped "${dir#.}")/")
    notes="$notes; not readable there: ${dir#./}"
done <"$tmp/closed"

# For the eyes: what follows is at least as new as what the progress says. -c: a file that is
# written anew may have kept its size within one second.
copy -c --exclude='checkpoint_[0-9]*' --include='*.json' --include='*.jsonl' --include='*.png' \
    --include='*.svg' --include='*.gif' --include='*.html' --include='*.txt' --include='*.csv' \
    --include='*/' --exclude='*' --prune-empty-dirs

# All the rest, but of training states the newest only. (The brackets make it a pattern.)
grep '/checkpoints[.]jsonl$' "$tmp/files" | sed 's|/[^/]*$||' >"$tmp/dirs"
newest=()
while IFS= read -r dir; do
    read -r name sum <<<"$(states "$dir")"
    dir=$(escaped "${dir#.}")
    [ -z "$name" ] ||
        newest+=("--include=$dir/[c]${name#c}" "--exclude=$dir/checkpoint_[0-9]*")
done <"$tmp/dirs"
copy --exclude=PROGRESS.txt --exclude=run.json ${newest[@]+"${newest[@]}"}
let_go
[ -z "$unreadable" ] || fail 2 "may not read all of $shown: $unreadable; all else was brought"
find "$to" -type d -name .rsync-partial -exec rm -rf {} +   # halves that nobody needs any more

[ "$gone" -eq 0 ] || notes="; $gone older training states let go$notes"
count=$(grep -Ev '/$|PROGRESS.txt$|checkpoints.jsonl$|^skipping' "$tmp/copied" | sort -u | wc -l)
say "$shown -> $to: $((count)) new files in $SECONDS s$notes"
