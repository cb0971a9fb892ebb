"""Sources: each turns a `--data` word into a stream of samples."""
