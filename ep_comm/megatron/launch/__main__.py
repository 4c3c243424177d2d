"""``python -m ep_comm.megatron.launch``: the launcher."""

from ep_comm.megatron.launch.main import main

if __name__ == "__main__":
    main()
