"""Read rows lazily from files, folders, URLs, data sets and mixtures of them; `base` defines a source."""
