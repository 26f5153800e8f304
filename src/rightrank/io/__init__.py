"""Everything that touches a disk or a third party's format, one in each file."""
