# Local NVMe disks become one file system at /mnt/nvme, for caches and offloaded state, where the image has not done so already.
set -eu
sudo mkdir -p /mnt/nvme
if mountpoint -q /mnt/nvme; then exit 0; fi
if mountpoint -q /opt/dlami/nvme; then
  sudo mount --bind /opt/dlami/nvme /mnt/nvme
else
  # By model, so that no disk with data is ever formatted: these are empty at every start of the machine.
  disks=$(lsblk -dpno NAME,MODEL | awk '/Amazon EC2 NVMe Instance Storage|Microsoft NVMe Direct Disk|nvme_card *$/ {print $1}')
  count=$(echo "$disks" | wc -w)
  if [ "$count" -gt 1 ]; then
    sudo mdadm --create /dev/md0 --run --level=0 --raid-devices="$count" $disks
    disks=/dev/md0
  fi
  if [ "$count" -gt 0 ]; then
    sudo mkfs.ext4 -q -F -m 0 "$disks"
    sudo mount -o noatime "$disks" /mnt/nvme
  fi
fi
sudo chmod 1777 /mnt/nvme
