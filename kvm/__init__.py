"""The machine: a VMM whose VCPU state moves only through the hooks of :mod:`kvm.sync`."""
