//! From our own description to a running libvirt domain.
