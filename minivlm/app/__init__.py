"""The application side: command lines, chat on a terminal, traces, pictures, statistics in words."""
