"""Work with other programs: read their result tables, write settings for trainers and servers, and truncate the adapters that they train."""
