"""Names that Megatron's annotations mention; none is called."""


class Sequential:
    pass


class FusibleOperation:
    pass
