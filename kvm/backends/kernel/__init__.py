"""The /dev/kvm backend."""
