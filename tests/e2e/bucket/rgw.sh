#!/bin/sh
# A small Ceph on loopback with everything in memory, for `make test-s3`: a monitor, an OSD, and the S3 gateway.
#   apt-get install radosgw ceph-mon ceph-osd
#   tests/e2e/bucket/rgw.sh FOLDER [PORT]     starts it; keys are those of tests/support/buckets/s3server.py
#   tests/e2e/bucket/rgw.sh FOLDER stop
set -eu
id=0f0f0f0f-0000-4000-8000-0f0f0f0f0f0f
folder=$(realpath -m "$1") port=${2:-7480}
if [ "$port" = stop ]; then
    for file in "$folder"/run/*.pid; do
        [ -e "$file" ] && kill "$(cat "$file")" || true
    done
    exit 0
fi
mkdir -p "$folder/run" "$folder/mon" "$folder/osd" "$folder/mgr" "$folder/log"
cat > "$folder/ceph.conf" <<END
[global]
fsid = $id
mon host = v1:127.0.0.1:$((port + 1))
mon initial members = a
auth cluster required = none
auth service required = none
auth client required = none
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data = $folder/mon
osd data = $folder/osd
osd objectstore = memstore
memstore device bytes = 2147483648
rgw data = $folder/rgw
log file = $folder/log/\$name.log
admin socket = $folder/run/\$name.asok
pid file = $folder/run/\$name.pid
rgw frontends = beast endpoint=127.0.0.1:$port
rgw enable usage log = false
rgw gc max objs = 8
rgw usage max shards = 1
rgw lc max objs = 1
END
export CEPH_CONF="$folder/ceph.conf"
monmaptool --create --clobber --fsid $id --addv a "[v1:127.0.0.1:$((port + 1))]" "$folder/monmap"
ceph-mon --mkfs -i a --monmap "$folder/monmap"
ceph-mon -i a
ceph osd new $id
ceph-osd -i 0 --mkfs --osd-uuid $id
ceph-osd -i 0
radosgw-admin user create --uid nfm --display-name nfm --access-key key --secret-key secret
radosgw -n client.rgw
