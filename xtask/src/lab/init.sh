#!/bin/busybox sh
# The guest's first process: makes the host's files its own, with a layer in memory for what is written, and goes on
# with guest.sh there. Runs from the initial RAM disk, where there is busybox and nothing else.
b=/bin/busybox
give_up() { echo "lab: $*" >/dev/console; $b poweroff -f; }

for folder in proc sys dev lower upper system; do $b mkdir -p /$folder; done
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
for module in /modules/*; do $b insmod "$module" || give_up "cannot load $module"; done

share=trans=virtio,version=9p2000.L,msize=524288
$b mount -t 9p -o ro,$share,cache=loose host /lower || give_up "cannot mount the host's files"
$b mount -t tmpfs tmpfs /upper
$b mkdir /upper/files /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /system ||
    give_up "cannot lay memory over the host's files"
for folder in proc sys dev; do
    $b mkdir -p /system/$folder
    $b mount --move /$folder /system/$folder
done
$b mkdir -p /system/.lab /system/lib/modules /system/tmp /system/run
$b mount -t 9p -o $share lab /system/.lab || give_up "cannot mount the run's folder"
exec $b switch_root /system /bin/bash /.lab/guest.sh </dev/console >/dev/console 2>&1
