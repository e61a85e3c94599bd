"""All that is x86: the structs state travels in, the substate table, reset values, paging."""
