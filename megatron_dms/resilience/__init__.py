"""What happens at kill -9, told in order.

1. Every rank has a watchdog (watchdog.py): a thread that publishes a heartbeat and watches a neighbour's.
   When a rank is killed, torchrun ends the other ranks, and before they go their watchdogs name the rank that
   is lost. A rank that hangs, or whose machine is gone, is named after a time limit (hang_diagnosis.py).
2. The processes that helped the killed rank to save end with it (save_worker.py, megatron_dms/processes.py).
3. The checkpoints that were finished before are still on the disk. A save writes into a folder beside them.
   All ranks read it back and compute checksums (verified_saves.py); if one rank fails, all end with one line
   (collective_steps.py). Then the folder is moved to its place, and the pointer is replaced last. Each step
   is one rename, on disk before the next (run_folder.py), so a kill leaves the state before a step or after.
4. The same command starts again. It finds the checkpoint that the pointer names (run_folder.py), and all
   ranks compare every byte with the checksums. A damaged checkpoint is set aside, and the newest one before
   it takes its place (verified_saves.py).
5. The run ends with the bits of a run that was never killed. resume_check.py (tools/verify_resume.py) shows
   whether a given command does: it kills, resumes and compares.

docs/survival.md and docs/cluster.md tell this to users.
"""
