"""From facts to choices: a pure function, with a file for each kind of run."""
