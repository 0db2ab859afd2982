#!/usr/bin/env bash
# See what every run below a directory is doing, on this machine or over ssh, until all have ended.
# Works with macOS's bash 3.2 and BSD tools. The remote machine needs only sh, find, sed, head, tr, date and ps.
set -u
export LC_ALL=C PATH="$PATH:/usr/bin:/bin:/usr/sbin:/sbin"

usage() {
    cat <<'END'
usage: monitor_progress.sh [-1] [-i SECONDS] [-k KEY] [USER@HOST:]DIR ...
  -1          look once
  -i SECONDS  between two looks (default 30)
  -k KEY      the ssh key to use
Without a target, REMOTE from the environment is watched, with the key SSH_KEY if it is set:
  export REMOTE=ubuntu@ec2:project/results SSH_KEY=~/.ssh/ec2.pem; ./monitor_progress.sh
Exit codes: 0 all COMPLETE; 1 one is FAILED, INTERRUPTED or DEAD; 2 usage, key or host key; with -1 also 3 unreachable,
4 not ended yet; 130 Ctrl-C.
END
}

fail() { printf 'monitor_progress.sh: %s\n' "$*" >&2; exit 2; }

once='' interval=30 key=${SSH_KEY:-}
while getopts ':1i:k:h' flag; do
    case $flag in
        1) once=yes ;;
        i) interval=$OPTARG ;;
        k) key=$OPTARG ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || set -- ${REMOTE:+"$REMOTE"}
if [ $# -eq 0 ]; then usage >&2; exit 2; fi
case $interval in '' | *[!0-9]* | 0 | ???????*) fail "-i takes a number of seconds, not $interval" ;; esac
if [ -n "$key" ] && [ ! -r "$key" ]; then fail "no key $key; give the path of a private key with -k"; fi

limit=${MONITOR_TIMEOUT:-45}   # seconds a look may take in all, even if the far side freezes
tmp=$(mktemp -d "${TMPDIR:-/tmp}/monitor.XXXXXX") || exit 2
looker=''
stop_looking() {
    if [ -n "$looker" ]; then kill -TERM -- "-$looker" 2>/dev/null; wait "$looker" 2>/dev/null; looker=''; fi
}
trap 'stop_looking; rm -rf "$tmp"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# ---- what runs on the far side ---------------------------------------------------------------------------------------
# It gets `dir` and `mark` in front. Every line of a file is sent behind a "|", so that no file can speak for us; control
# characters never leave the remote machine, and of a file only the first 16 kB.
far_side() {
    printf 'dir=%s mark=%s\n' "$(quote "$1")" "$mark"
    cat <<'END'
LC_ALL=C; export LC_ALL
case $dir in '~') dir=$HOME ;; '~/'*) dir=$HOME/${dir#'~/'} ;; esac
printf '%s now %s\n' "$mark" "$(date +%s)"
if cd "$dir" 2>/dev/null; then
    find . -maxdepth 6 -name PROGRESS.txt -type f 2>/dev/null | sort | head -n 200 | while IFS= read -r file; do
        text=$(head -c 16384 "$file" | tr -c '\n -~' '?')
        pid=$(printf '%s\n' "$text" | sed -n 's/^PID: \([0-9]\{1,9\}\)$/\1/p' | head -n 1)
        host=$(printf '%s\n' "$text" | sed -n 's/^Host: //p' | head -n 1)
        life=unknown
        if [ -n "$pid" ] && [ "$host" = "$(hostname | tr -c '\n -~' '?')" ]; then
            life=no
            if ps -p "$pid" >/dev/null 2>&1; then life=$(ps -o etime= -p "$pid" | tr -d ' '); fi
        fi
        printf '%s run %s %s\n' "$mark" "${life:-unknown}" "$(printf '%s' "${file#./}" | tr -c ' -~' '?')"
        printf '%s\n' "$text" | sed 's/^/|/' | head -n 40 | cut -c 1-400
    done
else
    printf '%s missing\n' "$mark"
fi
printf '%s end\n' "$mark"
END
}

quote() { printf "'"; printf '%s' "$1" | sed "s/'/'\\\\''/g"; printf "'"; }

# One look at target number $1: leaves $tmp/look.$1 and returns 0, or leaves $tmp/trouble and returns 1.
look() {
    local target host started
    target=$2 host=''
    case ${target%%/*} in *:*) host=${target%%:*} target=${target#*:} ;; esac
    mark="look-$$-$RANDOM$RANDOM"
    far_side "${target:-.}" >"$tmp/script"
    started=$(date +%s)
    if [ -n "$host" ]; then
        set -- ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3 \
            -o StrictHostKeyChecking=accept-new -o ClearAllForwardings=yes ${key:+-o IdentitiesOnly=yes -i "$key"} \
            -- "$host" 'sh -s'
    else
        set -- sh -s
    fi
    # In a process group of its own, so that Ctrl-C here and the alarm there leave nothing behind.
    perl -e 'setpgrp(0, 0); alarm shift; exec @ARGV or exit 127' "$limit" "$@" \
        <"$tmp/script" >"$tmp/answer" 2>"$tmp/trouble" &
    looker=$!
    wait "$looker"
    kill -TERM -- "-$looker" 2>/dev/null
    looker=''
    if ! tail -n 1 "$tmp/answer" | grep -qx "$mark end"; then return 1; fi
    # A laptop that slept during the look has an answer of unknown age: look again.
    if [ $(($(date +%s) - started)) -gt $((limit + 30)) ]; then return 1; fi
    sed -n "s/^$mark /=/p; /^|/p" "$tmp/answer" >"$tmp/looked"
}

# ---- judging --------------------------------------------------------------------------------------------------------

field() { sed -n "s/^|$1: //p" "$2" | head -n 1; }   # the first line of a key counts
number() { case ${1:-x} in *[!0-9]* | ????????????????*) printf '%s' "$2" ;; *) printf '%s' "$((10#$1))" ;; esac; }

# Seconds since a process started, from ps's [[days-]hours:]minutes:seconds.
seconds_of() {
    printf '%s\n' "$1" | awk -F '[-:]' '{ s = $NF + 60 * $(NF - 1); if (NF > 2) s += 3600 * $(NF - 2)
        if (NF > 3) s += 86400 * $(NF - 3); printf "%d", s }'
}

# Prints "WORD note" for the run in file $1, at remote time $2, with the process's life $3.
judge() {
    local status heartbeat every age
    status=$(field Status "$1")
    heartbeat=$(number "$(field Heartbeat "$1")" '')
    [ -n "$heartbeat" ] || status=unreadable
    every=$(field Interval "$1")
    every=$(number "${every%%[. ]*}" 30)
    [ "$every" -gt 0 ] || every=1
    age=$(($2 - ${heartbeat:-0}))
    case $status in
        COMPLETE | INTERRUPTED) printf '%s' "$status" ;;
        FAILED) printf 'FAILED %s' "$(field Error "$1")" ;;
        RUNNING | STALLED)
            if [ "$age" -gt $((3 * every)) ]; then
                case $3 in
                    no) printf 'DEAD no such process; start it again with the same command'; return ;;
                    unknown) ;;
                    *)  # a process that began after the last heartbeat has the number of ours, no more
                        if [ $(($2 - $(seconds_of "$3"))) -gt $((heartbeat + 5)) ]; then
                            printf 'DEAD its process number belongs to another now; start it again'; return
                        fi ;;
                esac
                printf 'STALLED no heartbeat for %s' "$(ago "$age")"
            elif [ "$status" = STALLED ]; then
                printf 'STALLED the heart beats, the work has not moved for %s' \
                    "$(ago $(($2 - $(number "$(field Advanced "$1")" "$2"))))"
            else
                printf 'RUNNING'
            fi ;;
        *) printf 'UNKNOWN this is not a whole PROGRESS.txt' ;;
    esac
}

ago() {
    local s=$1
    [ "$s" -ge 0 ] || s=0
    if [ "$s" -lt 120 ]; then printf '%d s' "$s"
    elif [ "$s" -lt 7200 ]; then printf '%d min' $((s / 60))
    elif [ "$s" -lt 172800 ]; then printf '%d h %d min' $((s / 3600)) $((s % 3600 / 60))
    else printf '%d days' $((s / 86400)); fi
}

# ---- showing --------------------------------------------------------------------------------------------------------

bar() {
    local percent filled
    percent=$(sed -n 's/^|Progress: .*(\([0-9]\{1,3\}\)\(\.[0-9]\)\{0,1\}%)$/\1/p' "$1" | head -n 1)
    percent=$(number "$percent" 0)
    [ "$percent" -le 100 ] || percent=100
    filled=$((percent * 40 / 100))
    printf '[%.*s%.*s] %d%%\n' "$filled" '########################################' \
        $((40 - filled)) '----------------------------------------' "$percent"
}

notify() {
    if command -v osascript >/dev/null 2>&1; then   # text as arguments, never as part of the script
        osascript -e 'on run argv' -e 'display notification (item 2 of argv) with title (item 1 of argv)' -e 'end run' \
            -- "$1" "$2" >/dev/null 2>&1 || true
    else
        printf '\a'
    fi
}

# Show target number $1 ($2) from its last good look; $3 says whether the newest look failed. Adds to $tmp/words.
show() {
    local name=$2 fetched now=0 line run=0 life='' path='' age
    if [ ! -f "$tmp/good.$1" ]; then
        printf '%s: UNREACHABLE  never reached so far: %s\n\n' "$name" "$(reason)"
        printf 'UNREACHABLE\t%s\n' "$name" >>"$tmp/words"
        return
    fi
    fetched=$(($(date +%s) - $(cat "$tmp/time.$1")))
    rm -f "$tmp"/run.*
    while IFS= read -r line; do
        case $line in
            '=now '*) now=$(number "${line#=now }" 0) ;;
            '=run '*)
                run=$((run + 1)); line=${line#=run }
                printf '%s\n' "$line" >"$tmp/run.$run.head" ; : >"$tmp/run.$run" ;;
            '|'*) printf '%s\n' "$line" >>"$tmp/run.$run" ;;
        esac
    done <"$tmp/good.$1"
    if [ "$run" -eq 0 ]; then
        printf '%s: no run here yet (no PROGRESS.txt)\n\n' "$name"
        printf 'NONE\t%s\n' "$name" >>"$tmp/words"
    fi
    local i=1 word note at
    while [ "$i" -le "$run" ]; do
        read -r life path <"$tmp/run.$i.head"
        note=$(judge "$tmp/run.$i" "$now" "$life")
        word=${note%% *}; note=${note#"$word"}
        at="$name"
        case $path in */*) at="$name/${path%/*}" ;; esac
        if [ -n "$3" ]; then
            case $word in
                COMPLETE | FAILED | INTERRUPTED | DEAD) note="$note (as last seen)" ;;   # an end stays an end
                *) note=" last known: $word; $(reason)" word=UNREACHABLE ;;
            esac
        fi
        printf '%s: %s%s\n' "$at" "$word" "$note"
        bar "$tmp/run.$i"
        sed -n '1d; s/^|/  /p' "$tmp/run.$i" | grep -Ev '^  (Status|Error|Heartbeat|Advanced|Interval|Run|PID): '
        age=$((now - $(number "$(field Heartbeat "$tmp/run.$i")" "$now")))
        printf '  written %s before it was fetched, fetched %s ago\n\n' "$(ago "$age")" "$(ago "$fetched")"
        printf '%s\t%s\n' "$word" "$at" >>"$tmp/words"
        i=$((i + 1))
    done
}

reason() { grep -v '^Warning: Permanently added' "$tmp/trouble.$number" 2>/dev/null | tail -n 1 | tr -c '\n -~' '?' | cut -c 1-200; }

# Trouble that waiting does not mend: say what to type, and end.
final_trouble() {
    local host
    host=${1%%:*}
    if grep -q 'REMOTE HOST IDENTIFICATION HAS CHANGED\|Host key verification failed' "$tmp/trouble"; then
        fail "$host shows another host key than before. If you know why (a new machine behind the same name), type:" \
            "ssh-keygen -R ${host#*@}    Otherwise someone may be in between"
    elif grep -q 'Permission denied' "$tmp/trouble"; then
        fail "$host does not accept the key${key:+ $key}. Give the right one with -k KEY, or type: ssh-copy-id ${key:+-i $key }$host"
    elif grep -q 'Bad configuration option\|command-line: line\|hostname contains invalid characters' "$tmp/trouble"; then
        fail "$(tail -n 1 "$tmp/trouble" | tr -c '\n -~' '?')"
    fi
}

# ---- the loop -------------------------------------------------------------------------------------------------------

failures=0 woke=0
: >"$tmp/before"
while :; do
    number=0 unreachable=''
    for target in "$@"; do
        number=$((number + 1))
        case $target in -* | '') fail "$target is not a directory; see -h" ;; esac
        if look "$number" "$target"; then
            if grep -qx '=missing' "$tmp/looked"; then fail "$target: no such directory there"; fi
            mv "$tmp/looked" "$tmp/good.$number"
            date +%s >"$tmp/time.$number"
            rm -f "$tmp/bad.$number"
        else
            final_trouble "$target"
            cp "$tmp/trouble" "$tmp/trouble.$number"
            : >"$tmp/bad.$number"
            unreachable=yes
        fi
    done
    last=$(date +%s)
    # Right after waking the network is often down for some seconds: look again before saying so.
    if [ -n "$unreachable" ] && [ "$woke" -gt 0 ]; then woke=$((woke - 1)); sleep 3; continue; fi
    woke=0

    draw() {
        : >"$tmp/words"
        number=0
        for target in "$@"; do
            number=$((number + 1))
            show "$number" "$target" "$([ -f "$tmp/bad.$number" ] && echo bad)"
        done
    }
    draw "$@" >"$tmp/screen"
    if [ -t 1 ]; then printf '\033[H\033[2J\033[3J'; fi
    cat "$tmp/screen"

    # One notification for a change of state, never one a look.
    while IFS='	' read -r word at; do
        was=$(awk -F '\t' -v at="$at" '$2 == at { print $1; exit }' "$tmp/before")
        if [ -n "$was" ] && [ "$was" != "$word" ]; then notify "$word" "$at was $was"; fi
    done <"$tmp/words"
    cp "$tmp/words" "$tmp/before"

    if grep -q '^\(FAILED\|INTERRUPTED\|DEAD\)' "$tmp/words"; then code=1
    elif grep -q '^UNREACHABLE' "$tmp/words"; then code=3
    elif grep -q '^\(RUNNING\|STALLED\|UNKNOWN\|NONE\)' "$tmp/words"; then code=4
    else code=0; fi
    if [ -n "$once" ]; then exit "$code"; fi
    if ! grep -q '^\(RUNNING\|STALLED\|UNKNOWN\|NONE\|UNREACHABLE\)' "$tmp/words"; then exit "$code"; fi

    # Wait; twice as long after each failure, up to five minutes. On a terminal the ages keep counting.
    if [ -n "$unreachable" ]; then failures=$((failures + 1)); else failures=0; fi
    pause=$interval
    [ "$failures" -le 1 ] || pause=$((interval << (failures < 6 ? failures - 1 : 5)))
    if [ "$pause" -gt 300 ] && [ "$interval" -lt 300 ]; then pause=300; fi
    began=$last
    while now=$(date +%s) && [ $((now - began)) -lt "$pause" ]; do
        if [ $((now - last)) -gt 15 ] || [ "$now" -lt "$last" ]; then woke=3; break; fi   # we slept: look again at once
        last=$now
        sleep 1 &
        wait $!   # unlike sleep itself, this is interrupted by Ctrl-C
        if [ -t 1 ] && [ $((now % 5)) -eq 0 ]; then draw "$@" >"$tmp/screen"; printf '\033[H\033[2J'; cat "$tmp/screen"; fi
    done
done
