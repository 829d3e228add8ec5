"""What tools/bench.py measures; nothing else imports these."""
