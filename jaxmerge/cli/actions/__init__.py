"""What commands do once their options are read: a file for each, and what several of them share."""
