"""python bridge_runs.py REPORT TASK ARGUMENTS, in Bridge's environment: runs a task of bridge_tasks.py.

A file of its own, because the processes that write checkpoints load the main file again.
"""

if __name__ == "__main__":
    import bridge_tasks

    bridge_tasks.main()
