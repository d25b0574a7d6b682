//! The one choreography that needs machine and guest together.
