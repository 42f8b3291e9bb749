"""Kinds of file systems on which locks of one machine do not keep others out."""

from pathlib import Path

import psutil

NOT_LOCAL = frozenset(
    {"nfs", "nfs3", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afs", "9p", "lustre", "gpfs", "beegfs", "ceph",
     "glusterfs", "fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.ceph",
     "fuse.juicefs", "davfs"}
)  # fmt: skip
"""Shared over a network: their locks are missing, of one machine alone, or a matter of how they are mounted."""


def shared_file_system(path: Path) -> str | None:
    """The kind of file system that a path lies on if it is shared over a network, else None."""
    place = path.absolute()
    found, depth = None, -1
    for part in psutil.disk_partitions(all=True):
        mounted = Path(part.mountpoint)
        if place.is_relative_to(mounted) and len(mounted.parts) >= depth:
            found, depth = part.fstype, len(mounted.parts)
    return found if found in NOT_LOCAL else None
