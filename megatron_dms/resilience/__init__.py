"""What happens at kill -9: verified saves, the run's folder, the watchdog, and a check that kills runs."""
