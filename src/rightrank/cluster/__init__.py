"""Train in other processes: on this machine (loky), or on a Ray cluster.

A worker holds one base model and trains one task at a time. The driver, the process of the selection, distributes the trials and
receives each outcome exactly once, even if workers are lost. Adapters, checkpoints and the workers' messages are files in the run
folder, which all machines share. Strategies, the journal and the decision stay in the driver.
"""
