from ep_comm.megatron.launch.main import main

if __name__ == "__main__":
    main()
