"""Where rows come from: files of every type, folders, patterns and hubs."""
