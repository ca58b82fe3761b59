# The guest's first process once it has its files: sets up what a machine has after booting, runs the command, leaves
# its status in /.lab/status, and switches the machine off. What it says itself goes to the console.
. /.lab/environment
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

mount -t tmpfs tmpfs /run
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -sfn /proc/self/fd /dev/fd
mount --bind "$LAB_MODULES" /lib/modules
hostname lab
ip link set lo up

# There is no udev that would load drivers.
for module in igb igbvf netdevsim tun; do modprobe $module || echo "lab: no module $module"; done
# The kernel numbers the ports in the order of their slots; call them what they are.
number=0
for port in /sys/bus/pci/drivers/igb/*/net/*; do
    ip link set "${port##*/}" name pf$number && number=$((number + 1))
done

for port in /sys/class/virtio-ports/*; do
    case $(cat "$port/name") in
        out) out=/dev/${port##*/} ;;
        err) err=/dev/${port##*/} ;;
    esac
done
cd "$LAB_FOLDER" || cd /
/bin/bash -c "$LAB_COMMAND" </dev/null >"$out" 2>"$err"
echo $? >/.lab/status
sync
/.lab/busybox poweroff -f
