"""The `forkjail` backend: every run in a fork of the state before it, confined by the kernel."""
