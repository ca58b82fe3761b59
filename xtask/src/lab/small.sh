#!/bin/busybox sh
# The first process of the small guest: sets up its network card as the kernel's command line says
# (guest.address=ADDRESS/LENGTH, any number of them), starts what it serves (echo on TCP port 7, iperf3), and runs what the test says.
#
# The test is at the other end of a virtio serial port. When the guest has booted it says `ready ID`, with another ID each time.
# Each line that comes is a command for the shell, answered by a line `STATUS LENGTH` and so many bytes of output.
b=/bin/busybox
for folder in proc sys dev tmp run; do $b mkdir -p /$folder; done
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
$b --install -s /bin
# Addresses work at once.
for which in all default; do echo 0 >/proc/sys/net/ipv6/conf/$which/accept_dad; done
for module in /modules/*; do insmod "$module" || echo "guest: cannot load $module"; done

ip link set lo up
for word in $(cat /proc/cmdline); do
    case $word in
        guest.address=*) ip address add "${word#*=}" dev eth0 || echo "guest: no address" ;;
    esac
done
ip link set eth0 up || echo "guest: no network card"

nc -ll -p 7 -e cat </dev/null >/dev/null 2>&1 &
iperf3 --server </dev/null >/dev/null 2>&1 &

for port in /sys/class/virtio-ports/*; do
    [ "$(cat "$port/name")" = agent ] && agent=/dev/${port##*/}
done
exec 3<>"$agent" || echo "guest: no port to the test"
echo "ready $(cat /proc/sys/kernel/random/boot_id)" >&3
while read -r command <&3; do
    sh -c "$command" </dev/null >/tmp/output 2>&1
    echo "$? $(wc -c </tmp/output)" >&3
    cat /tmp/output >&3
done
echo "guest: the test has gone"
poweroff -f
