"""What tests/distributed.py starts in Bridge's environment: cheap to import, as it asks for."""


def perform(tasks):
    """Perform tasks of bridge_tasks.py in this process, one after the other: name -> (function, arguments).

    Returns:
        Name -> what it returned, or {"refused": message}.
    """
    from tests.integrations import bridge_tasks

    return {name: bridge_tasks.perform(*task) for name, task in tasks.items()}
