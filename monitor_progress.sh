#!/usr/bin/env bash
# See what every run below a directory does, on this machine or over ssh, until all are COMPLETE.
# Works with macOS's bash 3.2 and BSD tools. The remote machine needs sh, and flock or perl.
set -u
export LC_ALL=C PATH="$PATH:/usr/bin:/bin:/usr/sbin:/sbin"

usage() {
    cat <<'END'
usage: monitor_progress.sh [-1] [-i SECONDS] [-k KEY] [USER@HOST:]DIR ...
  -1 looks once; -i SECONDS between two looks (default 30); -k KEY is the ssh key to use
Without a target, REMOTE from the environment is watched, with the key SSH_KEY if it is set:
  export REMOTE=ubuntu@ec2:project/results SSH_KEY=~/.ssh/ec2.pem; ./monitor_progress.sh
Exit codes: 0 all are COMPLETE; 2 usage, key or host key; 130 Ctrl-C; with -1 also
1 one is FAILED, INTERRUPTED or DEAD; 3 unreachable; 4 not ended yet.
END
}

fail() { printf 'monitor_progress.sh: %s\n' "$*" >&2; exit 2; }

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
case $interval in '' | *[!0-9]* | 0 | ???????*) fail "-i takes seconds, not $interval" ;; esac
if [ -n "$key" ]; then
    [ -r "$key" ] || fail "cannot read the key $key; give the path of a private key with -k"
    ssh_options+=(-o IdentitiesOnly=yes -i "$key")
fi

# ---- looking ----------------------------------------------------------------------------------

limit=${MONITOR_TIMEOUT:-45}      # seconds a look may take in all, even if the far side freezes
mark="look-$$-$RANDOM$RANDOM"     # no file can speak for us: its lines come behind a "|"

# What runs on the far side: prints lock and PROGRESS.txt of each run. The lock decides whether it
# lives, whatever PID, zombie or container say. Runs that --fresh has put aside are left out.
far_side() {
    printf 'dir=%s mark=%s\n' "$(quote "$1")" "$mark"
    cat <<'END'
exec 2>/dev/null
LC_ALL=C; export LC_ALL
ask() {   # is lock $1 held or free? unknown where nobody can tell, as of a copy
    lock=unknown
    [ -r "$1" ] || return
    if command -v flock >/dev/null; then
        flock -sn "$1" true
    else
        perl -e 'use Fcntl ":flock"; open F, "<", shift or exit 2;
            flock F, LOCK_SH | LOCK_NB or exit($!{EWOULDBLOCK} ? 1 : 2)' "$1"
    fi
    case $? in 0) lock=free ;; 1) lock=held ;; esac
}
case $dir in '~') dir=$HOME ;; '~/'*) dir=$HOME/${dir#'~/'} ;; /*) ;; *) dir=./$dir ;; esac
cd "$dir" || { printf '%s missing\n' "$mark"; exit; }
printf '%s now %s\n' "$mark" "$(date +%s)"
if [ -f report.html ]; then printf '%s page\n' "$mark"; fi
find . -type d \( -name '.?*' -o -name '*.old[0-9]*' \) -prune -o \
    -name PROGRESS.txt -type f -print | sort | while IFS= read -r file; do
    for again in 1 2; do   # the second time if it ended or began in between
        ask "${file%/*}/.lock"
        text=$(head -c 65536 "$file")
        case $lock$text in free*'Status: RUNNING'* | held*'Status: COMPLETE'*) ;; *) break ;; esac
    done
    printf '%s run %s %s\n' "$mark" "$lock" "${file#./}"
    printf '%s\n' "$text" | sed 's/^/|/' | cut -c 1-400
done
printf '%s end\n' "$mark"
END
}

# Looks at target number $1, $2: leaves what it saw in seen[$1], or, if nothing, why in trouble[$1].
look() {
    local dir=$2 host='' answer command=(sh -s)
    case ${dir%%/*} in *:*)
        host=${dir%%:*} dir=${dir#*:}
        command=(ssh "${ssh_options[@]}" -- "$host" sh -s) ;;
    esac
    answer=$(far_side "${dir:-.}" |
        perl -e '$SIG{$_} = sub { $over = 1; kill KILL => -$child if $child } for "ALRM", "INT";
            alarm shift; $child = fork;
            if (!$child) { setpgrp; exec { $ARGV[0] } @ARGV if !$over; exit }
            kill KILL => -$child if $over; waitpid $child, 0' "$limit" "${command[@]}" 2>&1 |
        tr -d '\r' | tr -c '\n -~' '?')
    case $answer in
        *"$mark missing"*) fail "$2: no such directory${host:+ on $host}" ;;
        *"$mark end"*) seen[$1]=$answer trouble[$1]='' ;;
        *) if answer=$(reason "$answer" "$host"); then fail "$answer"; fi
            trouble[$1]="$mark trouble $answer" ;;
    esac
}

# One awk for all runs of a look: reads what was seen, writes the screen to descriptor 3 (a line a
# run if there are many), and prints what has changed, then "MARK was WORD NAME" of each run, for
# the next look. Its exit code is that of -1.
judge_and_show() {
    MARK=$mark NOW=$(date '+%H %M %S') awk '
    function ago(s) {
        if (s < 120) return sprintf("%d s", s < 0 ? 0 : s)
        if (s < 7200) return sprintf("%d min", s / 60)
        if (s < 172800) return sprintf("%d h %d min", s / 3600, s % 3600 / 60)
        return sprintf("%d days", s / 86400)
    }
    function number(key, otherwise) {
        return value[key] ~ /^[0-9]+([.][0-9]*)?( |$)/ ? value[key] + 0 : otherwise
    }
    # The time that is left, and the end on the clock of the reader if it is today.
    function eta(    left, clock, then) {
        if (number("ETA", -1) < 0) return "unknown"
        left = number("ETA") > age ? number("ETA") - age : 0
        split(ENVIRON["NOW"], clock, " ")
        then = clock[1] * 60 + clock[2] + (clock[3] + left) / 60
        return ago(left) (then < 1440 ? sprintf(", at %02d:%02d", then / 60, then % 60) : "")
    }
    function judge() {
        word = value["Status"]; note = ""
        age = now - number("Heartbeat", now)
        late = age > 3 * number("Interval", 30) + 60 ? "no heartbeat for " ago(age) : ""
        if (word !~ /^(RUNNING|STALLED|INTERRUPTED|FAILED|COMPLETE)$/ || !number("Heartbeat")) {
            word = "UNREADABLE"; note = "this is not a whole PROGRESS.txt"; lines = 0
        } else if (word != "RUNNING" && word != "STALLED") {
            if (word == "FAILED") note = value["Error"]
            if (lock == "held") { note = "it was " word; word = "STARTING" }
        } else if (lock == "free") { word = "DEAD"; note = "its process is gone" }
        else if (late && lock == "unknown") { word = "SILENT"; note = late }
        else if (late) note = late ": is its process stopped?"
        else if (word == "STALLED") note = "no step for " ago(now - number("Advanced", now))
        if (trouble != "" && word != "COMPLETE") {   # what is COMPLETE stays so
            note = "last known: " word "; " trouble; word = "UNREACHABLE"
        }
        percent = match(value["Progress"], /[0-9.]+%\)$/) ? \
            int(substr(value["Progress"], RSTART)) : -1
        if (percent > 100) percent = 100
    }
    # The bar, and the lines of PROGRESS.txt that tell people something.
    function details(    i, text, shown) {
        if (percent >= 0) text = sprintf("[%s%s] %d%%\n", substr(full, 1, percent * 0.3), \
            substr(empty, 1, 30 - int(percent * 0.3)), percent)
        for (i = 1; i <= lines; i++) {
            if (key[i] ~ hidden || word != "RUNNING" && key[i] ~ /^(Rate|ETA)$/) continue
            shown = key[i] == "Elapsed" ? ago(number(key[i])) : value[key[i]]
            text = text "  " key[i] ": " (key[i] == "ETA" ? eta() : shown) "\n"
        }
        if (word ~ ended) text = text "  to go on: " value["Command"] "\n"
        return text (lines ? "  written " ago(age) " before it was seen\n" : "")
    }
    function keep(name, more) {
        count++; tally[word]++; words[count] = word; names[count] = name
        block[count] = name ": " word (note == "" ? "" : "  " note) "\n" more "\n"
        if (word == "RUNNING" && note == "") note = "ETA " eta()
        if (word ~ ended) note = note "  saved: " value["Checkpoint"] "; go on: " value["Command"]
        line[count] = sprintf("%-11s %4s  %s  %s\n", word, (percent < 0 ? "" : percent "%"), \
            name, note)
    }
    function rest(word) { return substr($0, index($0, word) + length(word) + 1) }   # behind word
    BEGIN {
        screen = "cat >&3"; ended = "^(DEAD|INTERRUPTED|FAILED)$"
        full = "##############################"; empty = "------------------------------"
        hidden = "^(Status|Error|Last update|Heartbeat|Advanced|Interval|Run|PID|Host|Command)$"
    }
    /^[|]/ && path != "" {
        at = index($0, ": "); name = substr($0, 2, at - 2)
        if (titled++ && at && !(name in value)) {   # the first line of a key counts
            key[++lines] = name; value[name] = substr($0, at + 2)
        }
    }
    $1 != ENVIRON["MARK"] { next }
    path != "" {
        judge()
        sub(/\/?PROGRESS[.]txt$/, "", path)
        keep(target (path == "" ? "" : "/" path), details())
        path = ""; runs++
    }
    $2 == "was" { was[rest($3)] = $3 }
    $2 == "target" { target = rest($2); sub(/\/$/, "", target); trouble = ""; runs = 0 }
    $2 == "trouble" { trouble = rest($2) }
    $2 == "now" { now = $3 }
    $2 == "page" { pages = pages "pictures: " target "/report.html\n\n" }
    $2 == "run" { lock = $3; path = rest($3); lines = titled = 0; split("", value) }
    $2 == "end" && !runs {
        word = trouble == "" ? "NONE" : "UNREACHABLE"
        note = trouble == "" ? "no run here yet (no PROGRESS.txt)" : trouble
        percent = -1; keep(target)
    }
    END {
        many = count > 4
        for (i = 1; i <= count; i++) {
            printf "%s", (many ? line[i] : block[i]) | screen
            if (names[i] in was && was[names[i]] != words[i])
                news = news (news ? ", " : "") names[i] ": " words[i] ", was " was[names[i]]
        }
        for (word in tally) if (many) printf "%d %s  ", tally[word], word | screen
        printf "%s%s", (many ? "\n\n" : ""), pages | screen
        close(screen)
        print news
        for (i = 1; i <= count; i++) print ENVIRON["MARK"] " was " words[i] " " names[i]
        if ("FAILED" in tally || "INTERRUPTED" in tally || "DEAD" in tally) exit 1
        if ("UNREACHABLE" in tally) exit 3
        exit (tally["COMPLETE"] == count) ? 0 : 4
    }'
}

# ---- the loop ---------------------------------------------------------------------------------

trap 'exit 130' INT
before='' seen=() trouble=() ended=''   # ended: all were COMPLETE at the last look
exec 3>&1
while :; do
    number=0 known=$before
    for target in "$@"; do
        number=$((number + 1))
        look "$number" "$target"
        known=$(printf '%s\n' "$known" "$mark target ${target//[[:cntrl:]]/?}" \
            "${trouble[number]}" "${seen[number]:-$mark end}")
    done
    if [ -t 1 ]; then printf '\033[H\033[J'; fi   # what was on the screen before stays above
    said=$(printf '%s\n' "$known" | judge_and_show)
    code=$?
    if [ -n "$once" ]; then exit "$code"; fi
    # A stage that follows another takes a moment to appear: believe COMPLETE when seen twice.
    if [ "$code$ended" = 0yes ]; then exit 0; fi
    if [ "$code" -eq 0 ]; then ended=yes; else ended=''; fi
    printf '%s, again in %s s%s\n\n' "$(date +%H:%M:%S)" "$interval" \
        "${ended:+, for a stage that is about to appear}"
    before=${said#*$'\n'} news=${said%%$'\n'*}
    if [ -n "$news" ] && command -v osascript >/dev/null; then   # text as an argument, not as code
        osascript -e 'on run argv' -e 'display notification (item 1 of argv) with title "monitor"' \
            -e 'end run' -- "$news" >/dev/null 2>&1
    elif [ -n "$news" ]; then
        printf '\a'
    fi
    sleep "$interval"
done
