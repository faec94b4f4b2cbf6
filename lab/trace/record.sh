#!/bin/sh
# Records the page events of this kernel, and what to keep beside them. Needs root and busybox (or any POSIX tools).
#
#   sh record.sh [-s SECONDS] [-b KIB_A_CPU] [-o FOLDER] [COMMAND [ARGUMENT...]]
#
# Records while COMMAND runs, or for SECONDS (default 60). FOLDER (default ./recording) must not exist; it gets
#   trace.txt                    the events, as trace_pipe prints them
#   start.* and end.*            kpageflags, buddyinfo, pagetypeinfo, zoneinfo, vmstat before and after
#   about.txt                    kernel, reporting order, clock, buffer, what was lost
# It uses a trace instance of its own, and leaves other tracing alone.
set -eu

seconds=60
buffer_kib=65536
folder=recording

fail() {
    echo "record.sh: $*" >&2
    exit 1
}

while getopts s:b:o: flag; do
    case $flag in
    s) seconds=$OPTARG ;;
    b) buffer_kib=$OPTARG ;;
    o) folder=$OPTARG ;;
    *) fail "usage: record.sh [-s SECONDS] [-b KIB_A_CPU] [-o FOLDER] [COMMAND [ARGUMENT...]]" ;;
    esac
done
shift $((OPTIND - 1))
case $seconds in '' | *[!0-9]*) fail "-s $seconds: expected whole seconds" ;; esac
case $buffer_kib in '' | *[!0-9]*) fail "-b $buffer_kib: expected KiB" ;; esac

[ "$(id -u)" = 0 ] || fail "needs root, to read /proc/kpageflags and tracefs"
[ -e "$folder" ] && fail "$folder: exists; name another folder with -o"

tracefs=
for place in /sys/kernel/tracing /sys/kernel/debug/tracing; do
    if [ -z "$tracefs" ] && [ -d "$place/events/kmem" ]; then
        tracefs=$place
    fi
done
if [ -z "$tracefs" ]; then
    mount -t tracefs tracefs /sys/kernel/tracing || fail "tracefs is not there: CONFIG_TRACING is needed"
    tracefs=/sys/kernel/tracing
fi
[ -d "$tracefs/events/kmem/mm_page_alloc" ] || fail "this kernel has no event kmem:mm_page_alloc"

mkdir -p "$folder"
instance=$tracefs/instances/record.$$
mkdir "$instance"
reader=

finish() {
    trap - EXIT HUP INT TERM
    echo 0 >"$instance/tracing_on" || true
    if [ -n "$reader" ]; then
        kill "$reader" 2>/dev/null || true
        wait "$reader" 2>/dev/null || true
    fi
    echo 0 >"$instance/events/enable" || true
    rmdir "$instance" || true
}
trap finish EXIT
trap 'exit 1' HUP INT TERM

keep() {
    for file in buddyinfo pagetypeinfo zoneinfo vmstat; do
        cat "/proc/$file" >"$folder/$1.$file" 2>/dev/null || true
    done
    cat /proc/kpageflags >"$folder/$1.kpageflags"
}

echo 0 >"$instance/tracing_on"
echo mono >"$instance/trace_clock"
echo "$buffer_kib" >"$instance/buffer_size_kb" || fail "no room for a buffer of $buffer_kib KiB a CPU; give a smaller -b"
events="mm_page_alloc mm_page_free mm_page_free_batched mm_page_alloc_zone_locked mm_page_pcpu_drain mm_page_alloc_extfrag"
for event in $events; do
    if [ -d "$instance/events/kmem/$event" ]; then
        echo 1 >"$instance/events/kmem/$event/enable"
    else
        echo "record.sh: this kernel has no event $event" >&2
    fi
done

# Where the reader cannot keep up, trace_pipe says how many events were lost.
cat "$instance/trace_pipe" >"$folder/trace.txt" &
reader=$!
keep start # the free lists right before the first event
echo 1 >"$instance/tracing_on"
echo "start" >"$instance/trace_marker"

status=0
if [ $# -gt 0 ]; then
    "$@" || status=$?
else
    sleep "$seconds"
fi

echo "end" >"$instance/trace_marker"
echo 0 >"$instance/tracing_on"
keep end

# The reader has everything when no CPU's buffer holds an entry any more.
unread() {
    cat "$instance"/per_cpu/cpu*/stats | awk '/^entries:/ { sum += $2 } END { print sum + 0 }'
}
waited=0
while [ "$(unread)" -gt 0 ] && [ "$waited" -lt 60 ]; do
    sleep 1
    waited=$((waited + 1))
done
sleep 1 # what it has read it also writes

{
    uname -a
    echo "page size: $(getconf PAGESIZE 2>/dev/null || echo 4096)"
    echo "clock: mono"
    echo "buffer: $buffer_kib KiB a CPU"
    for file in /sys/module/page_reporting/parameters/page_reporting_order /sys/kernel/mm/transparent_hugepage/enabled; do
        [ -r "$file" ] && echo "$file: $(cat "$file")"
    done
    for file in "$instance"/per_cpu/cpu*/stats; do
        cpu=${file%/stats}
        echo "${cpu##*/}: $(awk '/overrun|dropped/ { printf "%s; ", $0 }' "$file")"
    done
} >"$folder/about.txt"
if awk '/^cpu[0-9]+:/ && /: [1-9][0-9]*;/ { lost = 1 } END { exit !lost }' "$folder/about.txt"; then
    echo "record.sh: events were lost ($folder/about.txt); record again with a larger -b" >&2
fi
exit "$status"
