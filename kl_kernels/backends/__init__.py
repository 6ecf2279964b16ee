"""The backends: for each operator one function, of one argument."""
