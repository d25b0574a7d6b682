//! Makes the root file system fill the disk.
