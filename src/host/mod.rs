//! May it start now, and on which slot?
