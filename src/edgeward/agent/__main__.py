from edgeward.agent.main import main

raise SystemExit(main())
