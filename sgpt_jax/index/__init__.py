"""An index on disk: building, reading, searching, exporting."""
