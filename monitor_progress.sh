#!/usr/bin/env bash
# See what every run below a directory is doing, on this machine or over ssh, until all have ended.
# Works with macOS's bash 3.2 and BSD tools. The remote machine needs only sh and what every system
# has beside it: find, sed, head, tr, cut, sort, date, ps.
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
Exit codes: 0 all COMPLETE; 1 one is FAILED, INTERRUPTED or DEAD; 2 usage, key or host key; with -1
also 3 unreachable, 4 not ended yet; 130 Ctrl-C.
END
}

fail() { printf 'monitor_progress.sh: %s\n' "$*" >&2; exit 2; }

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
case $interval in '' | *[!0-9]* | 0 | ???????*)
    fail "-i takes a number of seconds, not $interval" ;;
esac
if [ -n "$key" ] && [ ! -r "$key" ]; then
    if [ -e "$key" ]; then fail "may not read the key $key; type: chmod 600 $(typed "$key")"; fi
    fail "no key $key; give the path of a private key with -k"
fi
for target in "$@"; do
    if trouble=$(target_trouble "$target"); then fail "$trouble"; fi
    case $target in
        '') fail "'' is not a directory; see -h" ;;
        -*) [ -d "./$target" ] || fail "$target is not a directory; see -h" ;;
    esac
done

limit=${MONITOR_TIMEOUT:-45}   # seconds a look may take in all, even if the far side freezes
tmp=$(mktemp -d "${TMPDIR:-/tmp}/monitor.XXXXXX") || exit 2
full() { fail "cannot write in $tmp: is that disk full? Nothing is known of the runs"; }
looker=''
stop_looking() {
    if [ -n "$looker" ]; then kill -TERM "$looker" 2>/dev/null; wait "$looker" 2>/dev/null; fi
    looker=''
}
trap 'stop_looking; rm -rf "$tmp"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# ---- looking ----------------------------------------------------------------------------------

# What runs on the far side; it gets `dir` and `mark` in front. Every line of a file is sent behind
# a "|", so that no file can speak for us; control characters never leave the remote machine, and
# of a file only the first 16 kB. Runs that train --fresh has put aside (NAME.old1) are left out.
far_side() {
    printf 'dir=%s mark=%s\n' "$(quote "$1")" "$2"
    cat <<'END'
LC_ALL=C; export LC_ALL
read_file() { text=$(head -c 16384 "$1" 2>/dev/null | tr -c '\n -~' '?'); }
value() { printf '%s\n' "$text" | sed -n "s/^$1: //p" | head -n 1; }
life_of() {   # no, unknown, or how long the process has run; a zombie is none
    said=$(kill -0 "$1" 2>&1) || case $said in *'o such process'*) echo no; return ;; esac
    case $(ps -o stat= -p "$1" 2>/dev/null) in Z* | ' Z'*) echo no; return ;; esac
    ps -o etime= -p "$1" 2>/dev/null | tr -d ' '
}
case $dir in '~') dir=$HOME ;; '~/'*) dir=$HOME/${dir#'~/'} ;; esac
case $dir in /*) ;; *) dir=./$dir ;; esac
printf '%s now %s\n' "$mark" "$(date +%s)"
here=$(hostname 2>/dev/null || uname -n)
here=$(printf '%s' "$here" | tr -c '\n -~' '?')
if cd "$dir" 2>/dev/null; then
    if [ -f report.html ]; then printf '%s page\n' "$mark"; fi
    shown=0
    find . -type d -name '*.old[0-9]*' -prune -o -name PROGRESS.txt -type f -print \
        2>/dev/null | sort | while IFS= read -r file; do
        shown=$((shown + 1))
        if [ "$shown" -gt 200 ]; then
            printf '%s more\n' "$mark"
            break
        fi
        read_file "$file"
        pid=$(value PID) life=
        case $pid in '' | *[!0-9]* | ??????????*) ;; *)
            if [ "$(value Host)" = "$here" ]; then life=$(life_of "$pid"); fi ;;
        esac
        # A process writes its last word before it ends: what is read now is final.
        if [ "$life" = no ]; then read_file "$file"; fi
        printf '%s run %s %s\n' "$mark" "${life:-unknown}" \
            "$(printf '%s' "${file#./}" | tr -c ' -~' '?')"
        printf '%s\n' "$text" | sed 's/^/|/' | head -n 40 | cut -c 1-400
    done
elif [ -d "$dir" ]; then
    printf '%s closed\n' "$mark"
else
    printf '%s missing\n' "$mark"
fi
printf '%s end\n' "$mark"
END
}

# One look at target $1: returns 0 and leaves $tmp/looked, or returns 1 and leaves $tmp/trouble.
look() {
    local target=$1 host='' started mark="look-$$-$RANDOM$RANDOM"
    case ${target%%/*} in *:*) host=${target%%:*} target=${target#*:} ;; esac
    far_side "${target:-.}" "$mark" >"$tmp/script" || full
    started=$(date +%s)
    if [ -n "$host" ]; then
        set -- ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 \
            -o ServerAliveCountMax=3 -o StrictHostKeyChecking=accept-new \
            -o ClearAllForwardings=yes -o RequestTTY=no -o RemoteCommand=none \
            ${key:+-o IdentitiesOnly=yes -i "$key"} -- "$host" 'sh -s'
    else
        set -- sh -s
    fi
    watched "$limit" "$@" <"$tmp/script" >"$tmp/answer" 2>"$tmp/trouble" &
    looker=$!
    wait "$looker"
    looker=''
    if ! tail -n 1 "$tmp/answer" | grep -qx "$mark end"; then
        host_words "$tmp/trouble" "$tmp/answer"
        return 1
    fi
    # A laptop that slept during the look has an answer of unknown age: look again.
    if [ $(($(date +%s) - started)) -gt $((limit + 30)) ]; then return 1; fi
    sed -n "s/^$mark /=/p; /^|/p" "$tmp/answer" >"$tmp/looked" || full
}

# Looks at all targets: $tmp/good.N is the last good look at number N, of the time $tmp/time.N, and
# $tmp/bad.N is ssh's words if the newest look failed. Returns 1 if one could not be reached.
look_at_all() {
    local target number=0 host words all=0
    for target in "$@"; do
        number=$((number + 1)) host=''
        case ${target%%/*} in *:*) host=${target%%:*} ;; esac
        if look "$target"; then
            if grep -qx '=missing' "$tmp/looked"; then
                fail "$target: no such directory${host:+ on $host}"
            elif grep -qx '=closed' "$tmp/looked"; then
                fail "$target: may not be entered${host:+ by the user that $host lets in}"
            fi
            mv "$tmp/looked" "$tmp/good.$number"
            date +%s >"$tmp/time.$number"
            rm -f "$tmp/bad.$number"
        else
            if words=$(ssh_trouble "$tmp/trouble" "$host" "$key"); then fail "$words"; fi
            cp "$tmp/trouble" "$tmp/bad.$number"
            all=1
        fi
    done
    return $all
}

# ---- judging ----------------------------------------------------------------------------------

field() { sed -n "s/^|$1: //p" "$2" | head -n 1; }   # the first line of a key counts
# Prints $1 as a number that arithmetic can take, or $2 if it is none.
number() {
    case ${1:-x} in
        *[!0-9]* | ????????????????*) printf '%s' "$2" ;;
        *) printf '%s' "$((10#$1))" ;;
    esac
}

# Seconds since a process started, from ps's [[days-]hours:]minutes:seconds.
seconds_of() {
    printf '%s\n' "$1" | awk -F '[-:]' '{
        s = $NF + 60 * $(NF - 1)
        if (NF > 2) s += 3600 * $(NF - 2)
        if (NF > 3) s += 86400 * $(NF - 3)
        printf "%d", s }'
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
            if [ "$3" = no ]; then
                printf 'DEAD no such process; start it again with the same command'
            elif [ "$age" -gt $((3 * every)) ] && [ "$3" != unknown ] &&
                [ $(($2 - $(seconds_of "$3"))) -gt $((heartbeat + 5)) ]; then
                # A process that began after the last heartbeat has the number of ours, no more.
                printf '%s' 'DEAD its process number belongs to another now;' \
                    ' start it again with the same command'
            elif [ "$age" -gt $((3 * every)) ]; then
                printf 'STALLED no heartbeat for %s' "$(ago "$age")"
            elif [ "$status" = STALLED ]; then
                printf 'STALLED the heart beats, the work has not moved for %s' \
                    "$(ago $(($2 - $(number "$(field Advanced "$1")" "$2"))))"
            elif starting "$1"; then
                printf 'RUNNING starting: no step yet'
            else
                printf 'RUNNING'
            fi ;;
        *) printf 'UNKNOWN this is not a whole PROGRESS.txt' ;;
    esac
}

starting() { case $(field Progress "$1") in 0/0*) ;; *) return 1 ;; esac; }   # still loading

ago() {
    local s=$1
    [ "$s" -ge 0 ] || s=0
    if [ "$s" -lt 120 ]; then printf '%d s' "$s"
    elif [ "$s" -lt 7200 ]; then printf '%d min' $((s / 60))
    elif [ "$s" -lt 172800 ]; then printf '%d h %d min' $((s / 3600)) $((s % 3600 / 60))
    else printf '%d days' $((s / 86400)); fi
}

# ---- showing ----------------------------------------------------------------------------------

bar() {
    local percent filled
    percent=$(sed -n 's/^|Progress: .*(\([0-9]\{1,3\}\)\(\.[0-9]\)\{0,1\}%)$/\1/p' "$1" | head -n 1)
    percent=$(number "$percent" 0)
    [ "$percent" -le 100 ] || percent=100
    filled=$((percent * 40 / 100))
    printf '[%.*s%.*s] %d%%\n' "$filled" '########################################' \
        $((40 - filled)) '----------------------------------------' "$percent"
}

# The lines of run $1 for a reader: seconds in minutes, the end in the reader's own time. $2 is its
# word, $3 how many seconds old the file is by now.
lines() {
    local line left
    starting "$1" || bar "$1"
    sed '1d; s/^|//' "$1" | while IFS= read -r line; do
        case $line in
            Status:* | Error:* | Heartbeat:* | Advanced:* | Interval:* | Run:* | PID:* | Host:* | \
                'Last update:'*) ;;
            'Progress: 0/0'*) ;;
            'Elapsed: '*' s')
                left=${line#Elapsed: }
                printf '  Elapsed: %s\n' "$(ago "$(number "${left% s}" 0)")" ;;
            'ETA: '*)
                left=${line#ETA: } left=$(number "${left%% *}" '')
                if [ "$2" = RUNNING ] && [ "${left:-9999999999}" -lt 9999999999 ]; then
                    left=$((left > $3 ? left - $3 : 0))
                    printf '  ETA: %s, %s\n' "$(ago "$left")" "$(clock "$left")"
                elif [ "$2" = RUNNING ]; then
                    printf '  %s\n' "$line"
                fi ;;
            *) printf '  %s\n' "$line" ;;
        esac
    done
}

# The time in $1 seconds, on the reader's own clock: "at 14:05", with the day if it is another one.
clock() {
    perl -MPOSIX=strftime -e '
        my ($now, $then) = (time, time + shift);
        my $day = "%Y-%m-%d";
        my $same = strftime($day, localtime $now) eq strftime($day, localtime $then);
        print strftime($same ? "at %H:%M" : "on $day at %H:%M", localtime $then);' "$1"
}

notify() {
    if command -v osascript >/dev/null 2>&1; then   # text as arguments, never part of the script
        osascript -e 'on run argv' \
            -e 'display notification (item 2 of argv) with title (item 1 of argv)' -e 'end run' \
            -- "$1" "$2" >/dev/null 2>&1 || true
    else
        printf '\a'
    fi
}

# Show target number $1 ($2) from its last good look. Adds its runs to $tmp/words.
show() {
    local name=$2 why='' fetched now=0 line run=0 i=1 page='' more=''
    case $name in *[!/:]/) name=${name%/} ;; esac
    if [ -f "$tmp/bad.$1" ]; then why=$(reason "$tmp/bad.$1"); why=${why:-no answer}; fi
    if [ ! -f "$tmp/good.$1" ]; then
        printf '%s: UNREACHABLE  never reached so far: %s\n\n' "$name" "$why"
        count UNREACHABLE "$name"
        return
    fi
    fetched=$(($(date +%s) - $(cat "$tmp/time.$1")))
    rm -f "$tmp"/run.*
    while IFS= read -r line; do
        case $line in
            '=now '*) now=$(number "${line#=now }" 0) ;;
            '=page') page=yes ;;
            '=more') more=yes ;;
            '=run '*)
                run=$((run + 1))
                printf '%s\n' "${line#=run }" >"$tmp/run.$run.head"
                : >"$tmp/run.$run" ;;
            '|'*) printf '%s\n' "$line" >>"$tmp/run.$run" ;;
        esac
    done <"$tmp/good.$1"
    if [ "$run" -eq 0 ]; then
        printf '%s: no run here yet (no PROGRESS.txt)\n\n' "$name"
        count NONE "$name"
    fi
    while [ "$i" -le "$run" ]; do
        show_run "$name" "$tmp/run.$i" "$now" "$fetched" "$why"
        i=$((i + 1))
    done
    if [ -n "$more" ]; then
        printf '%s: UNKNOWN  there are more runs than these %s; name a directory further down\n\n' \
            "$name" "$run"
        count UNKNOWN "$name (more)"
    fi
    if [ -n "$page" ]; then
        case ${name%%/*} in
            *:*) printf 'pictures: report.html there; sync_results.sh brings it here\n\n' ;;
            *) printf 'pictures: %s/report.html\n\n' "$name" ;;
        esac
    fi
}

# Show the run in file $2 of target $1, at remote time $3, fetched $4 s ago; $5 why no newer look.
show_run() {
    local life path note word at=$1 age pid
    IFS= read -r path <"$2.head"
    life=${path%% *} path=${path#* }
    note=$(judge "$2" "$3" "$life")
    word=${note%% *} note=${note#"${note%% *}"}
    case $path in */*) at="$1/${path%/*}" ;; esac
    age=$(($3 - $(number "$(field Heartbeat "$2")" "$3")))
    if [ -n "$5" ]; then
        case $word in
            COMPLETE | FAILED | INTERRUPTED | DEAD) note="$note (as last seen)" ;;   # an end stays
            *) note=" last known: $word; $5" word=UNREACHABLE ;;
        esac
    fi
    printf '%s: %s%s\n' "$at" "$word" "$note"
    lines "$2" "$word" $((age + $4))
    pid=$(number "$(field PID "$2")" '')
    case $word in RUNNING | STALLED)
        [ "${pid:-0}" -le 1 ] ||
            printf '  PID %s on %s; to stop it: kill %s\n' "$pid" "$(field Host "$2")" "$pid" ;;
    esac
    printf '  written %s before it was fetched, fetched %s ago\n\n' "$(ago "$age")" "$(ago "$4")"
    count "$word" "$at"
}

# Notes the word of one run.
count() {
    counted=$((counted + 1))
    printf '%s\t%s\n' "$1" "${2//[[:cntrl:]]/?}" >>"$tmp/words" || full
}

# Compose the screen for all targets in $tmp/screen; what each run is doing stands in $tmp/words
# then, a line "WORD<tab>name" for each.
compose() {
    local target number=0
    counted=0
    : >"$tmp/words"
    for target in "$@"; do
        number=$((number + 1))
        show "$number" "$target"
    done >"$tmp/screen"
    # A full disk here must not make a run that ended badly look like none.
    if [ "$counted" -lt "$number" ] || [ "$(grep -c . "$tmp/words")" -ne "$counted" ]; then full; fi
}

paint() {
    if [ -t 1 ]; then printf '\033[H\033[2J\033[3J'; fi
    cat "$tmp/screen"
    if [ -n "$ended" ]; then
        printf '%s\n' "All are COMPLETE. One more look in $interval s, for a run that is about to" \
            "appear; Ctrl-C ends this now."
    fi
}

# One notification for a change of state, never one a look.
notify_changes() {
    local word at was=''
    while IFS='	' read -r word at; do
        was=$(AT=$at awk -F '\t' '$2 == ENVIRON["AT"] { print $1; exit }' "$tmp/before")
        if [ -n "$was" ] && [ "$was" != "$word" ]; then notify "$word" "$at was $was"; fi
    done <"$tmp/words"
    cp "$tmp/words" "$tmp/before"
}

any() { grep -q "^\($1\)	" "$tmp/words"; }

exit_code() {
    if any 'FAILED\|INTERRUPTED\|DEAD'; then echo 1
    elif any 'UNREACHABLE'; then echo 3
    elif any 'RUNNING\|STALLED\|UNKNOWN\|NONE'; then echo 4
    else echo 0; fi
}

# Wait until $1 seconds after time $2, that of the last look; on a terminal the ages keep counting.
# Returns 1 if the laptop slept: look again at once.
pause() {
    local seconds=$1 began=$2 last=$2 now
    shift 2
    while now=$(date +%s) && [ $((now - began)) -lt "$seconds" ]; do
        if [ $((now - last)) -gt 15 ] || [ "$now" -lt "$last" ]; then return 1; fi
        last=$now
        sleep 1 &
        wait $!   # unlike sleep itself, this is interrupted by Ctrl-C
        if [ -t 1 ] && [ $((now % 5)) -eq 0 ]; then compose "$@"; paint; fi
    done
}

# ---- the loop ---------------------------------------------------------------------------------

failures=0 woke=0 ended=''   # ended: all were COMPLETE at the last look
: >"$tmp/before"
while :; do
    if look_at_all "$@"; then
        failures=0
    elif [ "$woke" -gt 0 ]; then   # right after waking the network is often down for some seconds
        woke=$((woke - 1))
        sleep 3
        continue
    else
        failures=$((failures + 1))
    fi
    woke=0 looked=$(date +%s)
    compose "$@"
    code=$(exit_code)
    # A stage that follows another takes a moment to appear: COMPLETE is believed when seen twice.
    if [ "$code" -eq 0 ] && [ -z "$once$ended" ]; then ended=yes; else ended=''; fi
    paint
    notify_changes
    if [ -n "$once" ]; then exit "$code"; fi
    if [ -z "$ended" ] && ! any 'RUNNING\|STALLED\|UNKNOWN\|NONE\|UNREACHABLE'; then
        exit "$code"
    fi

    # Twice as long after each failure, up to five minutes.
    seconds=$interval
    [ "$failures" -le 1 ] || seconds=$((interval << (failures < 6 ? failures - 1 : 5)))
    if [ "$seconds" -gt 300 ] && [ "$interval" -lt 300 ]; then seconds=300; fi
    pause "$seconds" "$looked" "$@" || woke=3
done
