"""What executes a plan: rings and fields, streams, channels, parties, sessions, and the clear oracle."""
