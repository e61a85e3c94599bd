"""What executes guests: ``kernel`` (/dev/kvm) and ``software`` (Unicorn), behind one interface."""
