"""Models for other runtimes: each target's file is written, loaded back in its own runtime and compared with eager."""
