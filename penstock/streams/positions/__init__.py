"""Which sample lies at which place of the endless stream: the order, mixtures, and what was served."""
