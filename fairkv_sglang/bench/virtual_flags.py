def add_arguments(parser):
    parser.add_argument("--virtual", action="store_true")


def run(args):
    return 0
