//! The command line: one file a command. The only part that reads the environment and prints.
