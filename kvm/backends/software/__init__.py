"""The Unicorn backend: a model of the kernel's side of KVM."""
