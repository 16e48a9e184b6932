"""The parts of `pretrain`: the pretext tasks, moving windows, and the rows that they are trained on."""
