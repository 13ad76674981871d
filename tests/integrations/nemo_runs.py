"""python nemo_runs.py TASK ARGUMENTS [-- TASK ARGUMENTS …], in NeMo's environment: runs tasks of nemo_tasks.py.

A file of its own, because the processes that write checkpoints load the main file again.
"""

if __name__ == "__main__":
    import nemo_tasks

    nemo_tasks.main()
