#!/usr/bin/env bash
# Copy what is finished from a results directory, over ssh or on this machine; for cron and launchd, or by hand.
# Works with macOS's bash 3.2, openrsync and perl. It never deletes anything here, and PROGRESS.txt comes last.
set -u
export LC_ALL=C PATH="$PATH:/usr/bin:/bin:/usr/sbin:/sbin"

usage() {
    cat <<'END'
usage: sync_results.sh [-k KEY] [USER@HOST:]DIR LOCAL_DIR
  -k KEY   the ssh key to use (cron has no agent)
Copies checkpoints, models and results, each under its name only once it is whole; goes on with what was cut off.
Prints one dated line. SYNC_SECONDS (default 1800) bounds a run.
Exit codes: 0 done, or another sync is at it; 1 this machine's fault (disk full, not writable); 2 settings (key, host key,
no such directory, no rsync there, a login banner); 75 try again later (unreachable, cut off).
END
}

say() { printf '%s %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*"; }
fail() {
    local code=$1
    shift
    say "sync_results.sh: $*" >&2
    exit "$code"
}

key=''
while getopts ':k:h' flag; do
    case $flag in
        k) key=$OPTARG ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
if [ $# -ne 2 ]; then usage >&2; exit 2; fi
from=$1 to=$2 host=''
case $from in '' | -*) fail 2 "'$from' is not a directory; see -h" ;; esac
case $to in '') fail 2 "the local directory has no name; see -h" ;; /*) ;; *) to=./$to ;; esac
case ${from%%/*} in *:*) host=${from%%:*} from=${from#*:} ;; esac
if [ -n "$key" ] && [ ! -r "$key" ]; then fail 2 "no key $key; give the path of a private key with -k"; fi
if [ -n "$host" ]; then   # relative to the home there, as ssh itself would have it
    case $from in '' | \~) from=. ;; \~/*) from=${from#??} ;; esac
fi
seconds=${SYNC_SECONDS:-1800}
case $seconds in '' | *[!0-9]* | 0 | ???????*) fail 2 "SYNC_SECONDS must be a number of seconds, not $seconds" ;; esac

if ! trouble=$(mkdir -p -- "$to" 2>&1); then fail 1 "cannot make $to: ${trouble##*: }"; fi

# ---- only one at a time ---------------------------------------------------------------------------------------------
# A kernel lock, held by this very process (exec keeps it): a dead process holds nothing, whatever its number is now.
if [ -z "${SYNC_RESULTS_LOCKED:-}" ]; then
    export SYNC_RESULTS_LOCKED=yes
    exec perl -e '
        use Fcntl qw(:DEFAULT :flock); use Errno qw(EWOULDBLOCK); use POSIX qw(strftime);
        my $path = shift;
        sub refuse { print STDERR strftime("%Y-%m-%d %H:%M:%S", localtime), " sync_results.sh: cannot $_[0] $path: $!\n"; exit 1 }
        $^F = 255;
        sysopen(LOCK, $path, O_RDWR | O_CREAT) or refuse("write");
        unless (flock(LOCK, LOCK_EX | LOCK_NB)) { exit 0 if $! == EWOULDBLOCK; refuse("lock") }
        exec { $ARGV[0] } @ARGV or exit 1;
    ' "$to/.sync_results.lock" "$BASH" "$0" ${key:+-k "$key"} -- "$1" "$2"
fi
unset SYNC_RESULTS_LOCKED

tmp=$(mktemp -d /tmp/sync_results.XXXXXX) || fail 1 "cannot make a directory in /tmp"
copier=''
# Returns once no process of rsync's group is left: one that lingers would hold our lock, and turn the next sync away.
stop_copying() {
    local tries=0
    [ -n "$copier" ] || return
    kill -TERM -- "-$copier" 2>/dev/null
    wait "$copier" 2>/dev/null
    while kill -0 -- "-$copier" 2>/dev/null && [ "$tries" -lt 30 ]; do sleep 0.1; tries=$((tries + 1)); done
    kill -KILL -- "-$copier" 2>/dev/null
    copier=''
}
trap 'stop_copying; rm -rf "$tmp"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# ---- copying --------------------------------------------------------------------------------------------------------
# rsync takes the name of a program to reach the host: one of ours, since options with spaces would be torn apart.
export SYNC_KEY=$key
cat >"$tmp/ssh" <<'END'
exec ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 \
    -o StrictHostKeyChecking=accept-new -o ClearAllForwardings=yes \
    ${SYNC_KEY:+-o IdentitiesOnly=yes -o IdentityAgent=none -i "$SYNC_KEY"} "$@"
END
source_of() { if [ -n "$host" ]; then printf '%s:%s/' "$host" "$(printf '%q' "$from")"; else printf '%s/' "$from"; fi; }
deadline=$(($(date +%s) + seconds))

# copy RSYNC_OPTION ...: one pass; a failure ends the program with what happened.
copy() {
    local left code
    left=$((deadline - $(date +%s)))
    [ "$left" -gt 0 ] || left=1
    # In a process group of its own, so that nothing is left behind by the alarm or by Ctrl-C.
    RSYNC_OLD_ARGS=1 RSYNC_PROTECT_ARGS=0 perl -e 'setpgrp(0, 0); alarm shift; exec @ARGV or exit 126' "$left" \
        rsync -rt --partial-dir=.rsync-partial --out-format=%n -e "sh $tmp/ssh" "$@" "$(source_of)" "$to/" \
        >>"$tmp/copied" 2>"$tmp/trouble" &
    copier=$!
    wait "$copier"
    code=$?
    stop_copying
    case $code in
        0 | 24) return 0 ;;   # 24: a file went away while we looked, as old checkpoints do
        142) fail 75 "not finished after $seconds s; the next run goes on from here" ;;
    esac
    explain "$code"
}

saw() { grep -qi "$1" "$tmp/trouble"; }

explain() {
    local last
    last=$(grep -v '^Warning: Permanently added\|^rsync error\|^@@@\|^$' "$tmp/trouble" | tail -n 1 | tr -c '\n -~' '?' | cut -c 1-200)
    if saw 'REMOTE HOST IDENTIFICATION HAS CHANGED\|Host key verification failed'; then
        fail 2 "$host shows another host key than before; if you know why, type: ssh-keygen -R ${host#*@}"
    elif saw 'Permission denied (.*publickey\|Permission denied (password\|Too many authentication failures'; then
        fail 2 "$host does not accept the key${key:+ $key}; give the right one with -k KEY, or type: ssh-copy-id $host"
    elif saw 'No space left\|Disk quota\|disk full'; then
        fail 1 "no room in $to; make some, and the next run goes on from here"
    elif saw 'Read-only file system'; then
        fail 1 "$to is read-only"
    elif saw 'mkstemp.*failed\|recv_generator.*failed\|\[\(receiver\|generator\)\].*denied\|failed to set times'; then
        fail 1 "cannot write to $to: $last"
    elif saw 'rsync.*not found\|command not found\|not recognized' || [ "$1" -eq 127 ]; then
        fail 2 "no rsync${host:+ on $host}; install it there (apt-get install rsync)"
    elif saw 'is your shell clean\|protocol version mismatch\|unexpected tag\|invalid.*handshake'; then
        fail 2 "$host prints text at login, which rsync cannot read past; silence it for non-interactive shells (.bashrc)"
    elif saw 'change_dir.*failed\|link_stat.*failed\|No such file or directory'; then
        fail 2 "no such directory: ${host:+$host:}$from"
    elif saw 'Bad configuration option\|hostname contains invalid\|invalid option\|unknown option'; then
        fail 2 "$last"
    elif saw 'Permission denied'; then
        fail 2 "may not read all of ${host:+$host:}$from: $last"
    fi
    fail 75 "${host:-rsync} cannot be reached or was cut off (${last:-rsync exit $1}); the next run goes on from here"
}

finished() { find "$to" -name PROGRESS.txt -type f -exec grep -l '^Status: COMPLETE' {} + 2>/dev/null | sort; }
results() { copy "$@" --exclude='.*' --exclude='*.tmp' --exclude='*.corrupt' --exclude=PROGRESS.txt; }

: >"$tmp/copied"
began=$(date +%s)
finished >"$tmp/before"
results
# -I: a progress file may have changed within one second and kept its size
copy -I --include='*/' --include=PROGRESS.txt --exclude='*' --prune-empty-dirs
finished >"$tmp/after"
# A run that ended while we copied has results newer than the first pass, and its small files may have kept their size.
if ! cmp -s "$tmp/before" "$tmp/after"; then
    results
    results -c --exclude='checkpoint_*'
fi
count=$(grep -cv '/$\|PROGRESS.txt$' "$tmp/copied")
say "${host:+$host:}$from -> $to: $count new files in $(($(date +%s) - began)) s"
