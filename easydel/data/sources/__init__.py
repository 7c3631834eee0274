"""Where rows come from: files, folders, URLs, data sets and mixtures of them, read lazily."""
