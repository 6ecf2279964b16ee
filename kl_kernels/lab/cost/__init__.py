"""Operations of a function on a GPU, counted and priced without one."""
