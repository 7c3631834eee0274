"""Read rows lazily from files, folders, URLs, data sets and mixtures of them; `base` says what a source gives."""
