"""Model folders: finding one, reading what it says, writing one."""
