"""The application: command lines, chat on a terminal, traces, overlays, statistics in words."""
